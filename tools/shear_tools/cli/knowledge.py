"""``shear-ir knowledge``: how much the loss grows when each group alone is pruned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shear_ir.errors import PlanError
from shear_tools.cli import console, options
from shear_tools.cli.models import open_language_model

if TYPE_CHECKING:
    from torch import nn

    from shear_training.knowledge import Knowledge


def knowledge(
    model: options.ModelArgument,
    data: options.DataOption,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.json", help="Write the measurements here.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them: .svg, .png or .pdf.", show_default=False)
    ] = None,
    ratios: Annotated[
        list[float] | None,
        typer.Option(
            "--at", metavar="RATIO", help="Share of a group to mask; repeatable.", show_default="0.25 0.5 0.75"
        ),
    ] = None,
    freeze: Annotated[float, typer.Option(help="Share of the groups to leave whole, the most sensitive.")] = 0.1,
    rows: Annotated[int, typer.Option(help="Rows per source to measure on: of a data.yaml, to train on.", min=1)] = 32,
    kinds: options.KindsOption = None,
    device: options.DeviceOption = None,
    batch: Annotated[int, typer.Option(help="Rows per forward pass.", min=1)] = 8,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:
    """Prune each group of MODEL alone, by masks that are taken off again, and say where its knowledge lies.

    Nothing is trained and nothing of MODEL changes. The most sensitive groups are marked to be left whole; the file
    is what lorashear and shear_ir.plan(frozen=...) read.
    """
    console.refuse_file(out, ".json")
    console.refuse_file(plot, ".svg", ".png", ".pdf")
    _check(ratios, freeze)
    from shear_tools.api import pipeline
    from shear_tools.workflow.calibration import rows_to_judge_by
    from shear_training.evaluate import evaluate, require_readable
    from shear_training.knowledge import KINDS, RATIOS, measure_knowledge

    with console.Told() as told:
        told("loading", 0, 1)
        loaded, tokenizer = open_language_model(model, trust_remote_code, dtype, device)
        sources = rows_to_judge_by(data, tokenizer, told)
        require_readable(loaded.model, sources)
        measured = {name: each.spread(rows) for name, each in sources.items()}

        def loss(one: nn.Module) -> float:
            found = [evaluate(one, each, batch=batch) for each in measured.values()]
            return sum(each.nll for each in found) / len(found)

        told("tracing", 0, 1)
        groups = pipeline.groups(pipeline.trace(loaded.model))
        made = measure_knowledge(
            loaded.model, groups, loss, kinds=tuple(kinds or KINDS), ratios=tuple(ratios or RATIOS), share=freeze,
            progress=lambda done, total: told("measuring groups", done, total),
        )  # fmt: skip
    _write(made, out, plot)
    if json:
        console.put_json(_document(made, model))
    else:
        _put(made)


def _check(ratios: list[float] | None, freeze: float) -> None:
    for ratio in ratios or ():
        if not 0.0 < ratio < 1.0:
            raise PlanError(f"--at is a share of a group between 0 and 1, not {ratio:g}")
    if not 0.0 <= freeze <= 1.0:
        raise PlanError(f"--freeze is a share of the groups between 0 and 1, not {freeze:g}")


def _write(made: Knowledge, out: Path | None, plot: Path | None) -> None:
    from shear_tools.workflow.plots import plot_knowledge

    if out is not None:
        console.write_file(out, made.to_json())
    if plot is not None:
        plot_knowledge(made, plot)


def _put(made: Knowledge) -> None:
    headings = ("group", "kind", "module", "units", *(f"at {ratio:g}" for ratio in made.ratios), "mean", "")
    rows = [
        (g.group, g.kind, g.module, f"{g.size:,}", *map(_nats, g.deviations), _nats(g.mean),
         "leave whole" if g.frozen else "")
        for g in made.ranked()
    ]  # fmt: skip
    console.put_table(
        console.table("growth of the loss in nats per token, the most sensitive first", headings, rows, headings[3:-1])
    )
    perplexity = math.exp(min(made.loss, 700.0))
    console.put_lines(f"the whole model: {made.loss:.4f} nats per token, perplexity {perplexity:.2f}")


def _nats(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "not a number"


def _document(made: Knowledge, model: str) -> dict[str, Any]:
    groups = [
        {"group": g.group, "kind": g.kind, "module": g.module, "units": g.size, "deviations": list(g.deviations),
         "perplexities": [math.exp(min(made.loss + d, 700.0)) for d in g.deviations],
         "mean": g.mean, "frozen": g.frozen}
        for g in made.ranked()
    ]  # fmt: skip
    return {"model": model, "digest": made.digest, "loss": made.loss, "ratios": list(made.ratios), "groups": groups}
