"""``shear-ir sweep``: several ratios and criteria, and what each costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shear_tools.cli import console, options
from shear_tools.cli.models import open_language_model

if TYPE_CHECKING:
    from shear_tools.workflow.sweep import Point, Sweep


def sweep(
    model: options.ModelArgument,
    data: options.DataOption,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share of the budget; repeatable.", show_default="0.1 0.2 0.3 0.5")
    ] = None,
    importance: Annotated[
        list[str] | None, typer.Option(help="A criterion; repeatable.", show_default="the default with data")
    ] = None,
    allocation: Annotated[
        list[str] | None, typer.Option(help="How layers share; repeatable.", show_default="uniform")
    ] = None,
    repair: Annotated[
        list[str] | None,
        typer.Option(help="none, least-squares or flap-bias; repeatable.", show_default="none least-squares"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE.json", help="Keep results here; go on from it.", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw loss against size: .svg, .png or .pdf.", show_default=False),
    ] = None,
    knowledge: options.KnowledgeOption = None,
    budget: options.BudgetOption = None,
    floor: options.FloorOption = None,
    only: options.OnlyOption = None,
    skip: options.SkipOption = None,
    kinds: options.KindsOption = None,
    round_to: options.RoundToOption = None,
    samples: options.SamplesOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the rows that are drawn, and of random criteria.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Rows per forward pass.", min=1)] = 8,
    device: options.DeviceOption = None,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:
    """Prune MODEL in every combination that is asked for, without training, and measure each on held-out text.

    Nothing is saved but the measurements. With -o the same command goes on where it was stopped.
    """
    console.refuse_file(plot, ".svg", ".png", ".pdf")
    if out is None or not out.exists():
        console.refuse_file(out, ".json")
    from shear_passes.importance import default
    from shear_tools.workflow.calibration import SAMPLES, calibration_batches
    from shear_tools.workflow.sweep import NONE, ranked, trials
    from shear_tools.workflow.sweep import sweep as run
    from shear_training.data import held_out, load_data
    from shear_training.evaluate import require_readable
    from shear_training.knowledge import Knowledge

    wanted = trials(
        ratio or (0.1, 0.2, 0.3, 0.5), importance or (default(data),), allocation or ("uniform",),
        repair or (NONE, "least-squares"),
    )  # fmt: skip
    options.require_knowledge(knowledge, *(allocation or ()))
    known = None if knowledge is None else Knowledge.load(knowledge)
    chosen = options.given(
        round_to=options.steps(round_to), kinds=kinds and tuple(kinds), budget=budget, floor=floor,
        only=only and tuple(only), skip=skip and tuple(skip),
    )  # fmt: skip
    config = load_data(data, whole=True)
    with console.Told() as told:
        told("loading", 0, 1)
        loaded, tokenizer = open_language_model(model, trust_remote_code, dtype, device)
        sources = held_out(config, tokenizer, told)
        require_readable(loaded.model, sources)
        batches, _ = calibration_batches(data, tokenizer, samples=samples or SAMPLES, seed=seed, progress=told)
        made = run(
            loaded.model, wanted, batches, sources, knowledge=known, keep=out, progress=told, seed=seed, batch=batch,
            **chosen,
        )  # fmt: skip
    if plot is not None:
        from shear_tools.workflow.plots import plot_sweep

        plot_sweep(made, plot)
    if json:
        console.put_json({"model": model, **made.to_json()})
    else:
        _put(ranked(made))


def _put(made: Sweep) -> None:
    sources = list(made.dense.losses)
    headings = ("ratio", "by", *sources, "mean NLL", "parameters")
    rows = [_row(point, sources) for point in (made.dense, *made.points)]
    console.put_table(console.table("perplexity on held-out text", headings, rows, headings[2:]))
    for point in made.points:
        if point.why:
            console.warn(f"{point.trial.label} at {point.trial.ratio:g}: {point.why}")


def _row(point: Point, sources: list[str]) -> tuple[str, ...]:
    costs = f"{point.costs.parameters:,}" if point.costs else ""
    found = [f"{point.losses[s].perplexity:.2f}" if point.losses else "" for s in sources]
    nll = f"{point.nll:.4f}" if point.losses else "not possible"
    return (f"{point.trial.ratio:g}" if point.trial.ratio else "", point.trial.label, *found, nll, costs)
