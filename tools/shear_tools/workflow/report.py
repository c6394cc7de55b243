"""The report of a run: what was removed, what it cost, what came back; Markdown for people, JSON for machines."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shear_ir.plans import Plan
from shear_ir.writing import placeless, write_text
from shear_tools.workflow.plots import plot_cuts, plot_knowledge, plot_losses
from shear_training.evaluate import Loss
from shear_training.knowledge import Knowledge
from shear_training.saliency import measured_names

REPORT_FILE = "report.md"
PACKAGES = ("shear-ir", "torch", "transformers", "peft", "accelerate", "datasets")
_COSTS = {"parameters": "parameters", "bytes": "bytes", "flops": "FLOPs per token", "kv_bytes": "KV bytes per token"}


def write_report(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``report.md``, ``report.json`` and the pictures into ``folder``; the JSON document."""
    plan, knowledge = run["plan"], run["knowledge"]
    document = _document(run)
    folder.joinpath("pictures").mkdir(exist_ok=True)
    plot_knowledge(knowledge, folder / "pictures" / "knowledge.svg")
    plot_losses(run["losses"], folder / "pictures" / "losses.svg")
    plot_cuts(plan, knowledge, folder / "pictures" / "kept.svg")
    write_text(folder / "report.json", json.dumps(_finite(document), indent=1))
    write_text(folder / REPORT_FILE, "\n".join(_markdown(run, document)) + "\n")
    knowledge.save(folder / "knowledge.json")
    return document


def degradation(losses: Mapping[str, Loss], dense: Mapping[str, Loss]) -> float:
    """How much the mean loss grew against the dense model, as a share: 0.01 is one percent."""
    return mean(losses) / mean(dense) - 1.0


def mean(losses: Mapping[str, Loss]) -> float:
    """The mean NLL of the sources, each of the same weight."""
    return sum(loss.nll for loss in losses.values()) / len(losses)


def _document(run: Mapping[str, Any]) -> dict[str, Any]:
    plan: Plan = run["plan"]
    knowledge: Knowledge = run["knowledge"]
    losses: Mapping[str, Mapping[str, Loss]] = run["losses"]
    return {
        "command": run["command"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seeds": {"pruning": run["recipe"]["pruning"]["seed"], "recovery": run["recipe"]["recovery"]["seed"],
                  "data": run["data"]["seed"]},
        "choice": run["choice"],
        "recipe": run["recipe"],
        "data": _placeless(run["data"]),
        "ratio": plan.ratio,
        "stock": run["stock"],
        "note": run["note"],
        "costs": {"dense": asdict(plan.before), "sheared": asdict(plan.after)},
        "speed": run["pruning"]["speed"],
        "pruning": {name: run["pruning"][name] for name in ("steps", "tokens", "repair") if name in run["pruning"]},
        "losses": {
            name: {source: {**asdict(loss), "perplexity": loss.perplexity} for source, loss in found.items()}
            for name, found in losses.items()
        },
        "degradation": {name: degradation(found, losses["dense"]) for name, found in losses.items()},
        "stages": run["stages"],
        "groups": _groups(plan, knowledge),
        "samples": run["samples"],
    }  # fmt: skip


def _placeless(value: Any) -> Any:
    """What ``data.yaml`` says, its paths without the folders above them."""
    if isinstance(value, dict):
        return {key: _placeless(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_placeless(each) for each in value]
    return placeless(value) if isinstance(value, str) else value


def _groups(plan: Plan, knowledge: Knowledge) -> list[dict[str, Any]]:
    """Every group that was measured: what its loss would do, and what it lost."""
    left = {cut.group: len(cut.kept) for cut in plan.cuts}
    return [
        {
            "group": g.group, "kind": g.kind, "module": g.module, "units": g.size, "kept": left.get(g.group, g.size),
            "deviation": g.mean, "frozen": g.frozen,
        }
        for g in knowledge.groups
    ]  # fmt: skip


def _markdown(run: Mapping[str, Any], document: Mapping[str, Any]) -> Iterable[str]:
    plan: Plan = run["plan"]
    losses: Mapping[str, Mapping[str, Loss]] = run["losses"]
    loads = "stock transformers load it" if run["stock"] else f"`shear_ir.load` loads it ({run['note']})"
    last = list(losses)[-1]
    worse = document["degradation"][last]
    yield f"# {plan.model}, {100 * plan.ratio:.1f} % smaller\n"
    yield (
        f"{plan.before.parameters - plan.after.parameters:,} of {plan.before.parameters:,} parameters are gone; "
        f"{loads}. After the last stage the mean loss is {mean(losses[last]):.3f} nats per token, "
        f"{100 * worse:+.1f} % against the dense model's {mean(losses['dense']):.3f}.\n"
    )
    yield "## Size and speed\n"
    yield from _table(
        ("", "dense", "sheared", "left"),
        [
            (name, f"{getattr(plan.before, key):,}", f"{getattr(plan.after, key):,}",
             _share(getattr(plan.after, key), getattr(plan.before, key)))
            for key, name in _COSTS.items()
        ]
        + [
            (f"tokens per second, {what}", f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", _share(speeds[1], speeds[0]))
            for what in ("forward", "generate")
            for speeds in [[document["speed"][model][what] for model in ("dense", "sheared")]]
        ],
    )  # fmt: skip
    yield "## Loss by source\n\nNLL in nats per token, with the perplexity in brackets, on held-out rows.\n"
    yield from _table(
        ("model", *losses["dense"], "mean", "against dense"),
        [
            (name, *(f"{loss.nll:.3f} ({loss.perplexity:.1f})" for loss in found.values()), f"{mean(found):.3f}",
             f"{100 * document['degradation'][name]:+.1f} %")
            for name, found in losses.items()
        ],
    )  # fmt: skip
    yield from _repair(document["pruning"].get("repair"))
    yield "![losses](pictures/losses.svg)\n"
    yield "## How units were chosen\n"
    yield f"{_choice(run['recipe'])}\n"
    yield "## What each group lost\n\nDeviation: how the mean loss grows when the group alone is pruned, in nats.\n"
    yield from _table(
        ("group", "module", "kind", "units", "kept", "deviation", ""),
        [
            (g["group"], f"`{g['module']}`", g["kind"], str(g["units"]), str(g["kept"]), f"{g['deviation']:+.3f}",
             "left whole: sensitive" if g["frozen"] else "")
            for g in document["groups"]
        ],
    )  # fmt: skip
    yield "![kept](pictures/kept.svg)\n\n![knowledge](pictures/knowledge.svg)\n"
    yield "## Recovery\n"
    for stage in document["stages"]:
        yield from _stage(stage)
    yield "## What they write\n"
    yield from (f"**{name}**\n\n```text\n{_plain(text)}\n```\n" for name, text in run["samples"].items())
    yield "## How it was made\n"
    yield f"```text\n{document['command'] or 'called from Python'}\n```\n"
    yield ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    yield (
        f"\nSeeds: {json.dumps(document['seeds'])}. Pruning took {document['pruning']['steps']} steps on "
        f"{document['pruning']['tokens']:,} tokens. All options are in `report.json`."
    )


def _choice(recipe: Mapping[str, Any]) -> str:
    knowledge, pruning = recipe["knowledge"], recipe["pruning"]
    shares = (
        "Layers lose what costs least by the knowledge distribution" if knowledge["allocate"]
        else "Units of a kind compete across layers" if pruning["compete"] else "Every layer loses the same share"
    )  # fmt: skip
    weights = ", ".join(f"{name} ({weight:g})" for name, weight in pruning["criteria"].items())
    measured = measured_names(pruning["criteria"])
    rows = f", on {pruning['calibration']} training rows where it looks at data" if measured else ""
    return f"{shares}; units go by {weights}{rows}."


def _repair(made: Mapping[str, Any] | None) -> Iterable[str]:
    if made is not None:
        yield (
            f"With the same units removed, the weights as LHSPG trained them have a loss of {made['trained']:.3f} on "
            f"the rows that knowledge is measured on, those from before it, repaired by {made['name']}, "
            f"{made['repaired']:.3f}: the {made['taken']} ones go on as `pruned`.\n"
        )


def _stage(stage: Mapping[str, Any]) -> Iterable[str]:
    count, best, why = len(stage["rounds"]), stage["best"], stage["stopped"]
    better = f"the best is {best}" if best else "none made it better"
    yield f"{stage['stage']}: {count} round{'s' * (count != 1)}, {better}; stopped: {why}.\n"
    names = list(stage["baseline"])
    yield from _table(
        ("round", *(f"{name}: share" for name in names), *(f"{name}: NLL" for name in names), "tokens", "seconds"),
        [
            (str(r["number"]), *(f"{r['weights'][n]:.2f}" for n in names), *(f"{r['after'][n]:.3f}" for n in names),
             f"{r['tokens']:,}", f"{r['seconds']:.0f}")
            for r in stage["rounds"]
        ],
    )  # fmt: skip


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def _share(after: float, before: float) -> str:
    return f"{100 * after / before:.1f} %" if before else "–"


def _plain(text: str) -> str:
    return text.replace("```", "'''")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
