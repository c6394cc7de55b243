"""Pictures of a run: where the knowledge is, what each group kept, how the losses came back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shear_ir.errors import SaveError
from shear_ir.plans import Plan
from shear_tools.workflow.sweep import Sweep
from shear_training.evaluate import Loss
from shear_training.knowledge import Knowledge

# One colour per kind, those that people with any colour sight can tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_FROZEN = "#999999"
_UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def plot_knowledge(knowledge: Knowledge, path: Path) -> None:
    """A bar per group along the depth of the model: how much the loss grows without it, in nats per token."""
    figure, axes = _figure(len(knowledge.groups))
    finite = [g.mean for g in knowledge.groups if math.isfinite(g.mean)]
    worst = max(finite, default=1.0)
    colours = _kinds(knowledge)
    for place, group in enumerate(knowledge.groups):
        height = group.mean if math.isfinite(group.mean) else worst
        hatch = "//" if group.frozen else ""
        axes.bar(place, height, color=colours[group.kind], hatch=hatch, edgecolor="white")
        if not math.isfinite(group.mean):
            axes.annotate("not a number", (place, height), ha="center", va="bottom", rotation=90, fontsize=7)
    _groups_below(axes, knowledge)
    axes.set_ylabel("growth of the loss, nats per token")
    axes.set_title(f"Each group pruned alone (mean of the ratios {', '.join(f'{r:g}' for r in knowledge.ratios)})")
    _legend(axes, {**colours, **({"left whole": _FROZEN} if knowledge.frozen else {})})
    _write(figure, path)


def plot_cuts(plan: Plan, knowledge: Knowledge, path: Path) -> None:
    """A bar per group along the depth: the share of its units that stayed."""
    figure, axes = _figure(len(knowledge.groups))
    left = {cut.group: len(cut.kept) / cut.size for cut in plan.cuts}
    colours = _kinds(knowledge)
    for place, group in enumerate(knowledge.groups):
        axes.bar(place, 1.0, color="#eeeeee")
        axes.bar(place, left.get(group.group, 1.0), color=colours[group.kind], hatch="//" if group.frozen else "",
                 edgecolor="white")  # fmt: skip
    _groups_below(axes, knowledge)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of units kept")
    axes.set_title("What each group kept")
    _legend(axes, colours)
    _write(figure, path)


def plot_losses(losses: Mapping[str, Mapping[str, Loss]], path: Path) -> None:
    """A line per source from the dense model over the pruned one to the last stage."""
    figure, axes = _figure(len(losses))
    for number, source in enumerate(losses["dense"]):
        values = [found[source].nll for found in losses.values()]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(range(len(values)), values, marker="o", color=colour, label=source)
        axes.axhline(values[0], color=colour, linewidth=0.6, linestyle=":")
    axes.set_xticks(range(len(losses)), list(losses))
    axes.set_ylabel("NLL, nats per token")
    axes.set_title("Loss on held-out text")
    axes.legend(frameon=False)
    _write(figure, path)


def plot_sweep(made: Sweep, path: Path) -> None:
    """A line per way to prune: the mean loss over the share of the parameters that is left."""
    lines = len({p.trial.label for p in made.points})
    figure, axes = _figure(24)
    figure.set_figheight(max(3.6, 0.8 + 0.2 * lines))
    assert made.dense.costs is not None
    whole = made.dense.costs.parameters
    chosen = list(dict.fromkeys((p.trial.importance, p.trial.allocation) for p in made.points))
    repairs = list(dict.fromkeys(p.trial.repair for p in made.points))
    for trial in dict.fromkeys(replace(p.trial, ratio=0.0) for p in made.points):
        mine = sorted(
            (p.costs.parameters / whole, p.nll)
            for p in made.points
            if replace(p.trial, ratio=0.0) == trial and p.costs is not None
        )
        # A colour for what chose the units, a line style for how they were repaired.
        number = chosen.index((trial.importance, trial.allocation))
        style, marker = ("-", "--", ":")[repairs.index(trial.repair) % 3], "os^Dv"[number // len(_COLOURS) % 5]
        axes.plot(*zip(*mine, strict=True), marker=marker, linestyle=style, color=_COLOURS[number % len(_COLOURS)],
                  label=trial.label)  # fmt: skip
    axes.axhline(made.dense.nll, color=_FROZEN, linewidth=0.8, linestyle=":", label="dense")
    axes.invert_xaxis()
    axes.set_xlabel("share of the parameters that is left")
    axes.set_ylabel("NLL, nats per token")
    axes.set_title("Loss on held-out text, without training")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _write(figure, path)


def _figure(bars: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(24.0, max(6.0, 0.32 * bars + 2.0)), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _kinds(knowledge: Knowledge) -> dict[str, str]:
    kinds = dict.fromkeys(g.kind for g in knowledge.groups)
    return {kind: _COLOURS[number % len(_COLOURS)] for number, kind in enumerate(kinds)}


def _groups_below(axes: Any, knowledge: Knowledge) -> None:
    names = [g.group for g in knowledge.groups]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _legend(axes: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, label=name, hatch="//" if colour == _FROZEN else "", edgecolor="white")
        for name, colour in colours.items()
    ]
    axes.legend(handles=patches, frameon=False, loc="best", fontsize=8)


def _write(figure: Any, path: Path) -> None:
    """The picture, whole or not at all, the same bytes for the same numbers; raises ``SaveError``."""
    from matplotlib import rc_context

    beside, kind = path.with_name(f".{path.name}"), path.suffix[1:].lower() or "svg"
    try:
        with rc_context({"svg.hashsalt": "shear-ir", "svg.fonttype": "none"}):
            figure.savefig(beside, format=kind, metadata=_UNDATED.get(kind))
        beside.replace(path)
    except OSError as failure:
        raise SaveError(f"{path} cannot be written: {failure.strerror or failure}") from failure
    finally:
        beside.unlink(missing_ok=True)
