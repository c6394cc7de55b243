"""``shear-ir opt``: run passes spelled as text and watch what each of them does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shear_ir.errors import ShearError
from shear_tools.cli import console, options
from shear_tools.cli.models import open_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shear_ir.manager import Pass


def opt(
    model: options.ModelArgument,
    passes: Annotated[
        str,
        typer.Option(
            "-p",
            "--passes",
            metavar="PASSES",
            show_default=False,
            help="Passes by name with their options: 'name{option=value option=[a,b]},name'.",
        ),
    ],
    print_between_passes: Annotated[
        bool, typer.Option("--print-between-passes", help="Print the program before the first and after each pass.")
    ] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print how long each pass took.")] = False,
    verify_each: Annotated[
        bool,
        typer.Option(
            "--verify-each",
            help="Check the program after every pass and, where there are weights, the outputs after every rewrite "
            "against those of the masked original. Without it, rewrites are checked, but not their outputs.",
        ),
    ] = False,
    draw_after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Draw the program after this pass.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            show_default=False,
            help="Where the last program is written; with --draw-after, where the picture is (groups.svg).",
        ),
    ] = None,
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:
    """Run passes on MODEL and print the program they end with.

    A wrong name lists the names near it. Plans come from a selection before shear, or from shear{plan=FILE}.
    """
    from shear_backends.draw.render import FORMATS
    from shear_backends.graph.module import named_tensors
    from shear_ir.frontend.export import trace
    from shear_ir.manager import PassManager
    from shear_passes.analysis.dump import Dump
    from shear_passes.pipelines import parse_pipeline
    from shear_tools.cli.watch import Watch

    steps = parse_pipeline(passes)
    picture = _picture(draw_after, out, steps)
    console.refuse_file(picture or out, *(f".{kind}" for kind in FORMATS if picture))
    with console.Steps("loading", "tracing") as step:
        with step("loading"):
            loaded = open_model(model, trust_remote_code, dtype, inputs)
        with step("tracing"):
            program = trace(loaded.model)
    weights = None if loaded.config_only else named_tensors(loaded.model)
    watch = Watch(
        loaded.model,
        printing=print_between_passes and not json,
        verifying=verify_each,
        comparing=verify_each and weights is not None,
        draw_after=draw_after,
        picture=picture,
    )
    watch.start(program)
    result = PassManager(steps, watch).run(program, weights)
    text = result.analyses.get(Dump())
    if out is not None and picture is None:
        console.write_file(out, f"{text}\n")
    if json:
        timings = [{"pass": name, "seconds": seconds} for name, seconds in result.timings]
        spelled = str(PassManager(steps))
        console.put_json({"model": model, "passes": spelled, "steps": watch.steps, "timings": timings, "text": text})
        return
    if not print_between_passes and (out is None or picture is not None):
        console.put_lines(text)
    if time_passes:
        rows = [(name, f"{1000 * seconds:,.1f}") for name, seconds in result.timings]
        total = ("total", f"{1000 * sum(seconds for _, seconds in result.timings):,.1f}")
        console.put_table(console.table("time by pass", ("pass", "ms"), [*rows, total], ("ms",)))


def _picture(draw_after: str | None, out: Path | None, steps: Sequence[Pass]) -> Path | None:
    if draw_after is None:
        return None
    names = [step.name() for step in steps]
    if draw_after not in names:
        raise ShearError(f"--draw-after names {draw_after}, which is not among the passes {', '.join(names)}")
    return out or Path("groups.svg")
