"""``shear-ir visualize``: a picture of the model, its tensors and its groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shear_tools.cli import console, options
from shear_tools.cli.models import open_model


def visualize(
    model: options.ModelArgument,
    group: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this group, with all its slices.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="RANGE", help="Blocks to unfold, as in 0-1,30.", show_default=False)
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Mark what this plan removes.", show_default=False)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="A .svg, .png, .pdf or .dot file; one that exists is replaced."
        ),
    ] = Path("groups.svg"),
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Draw MODEL: modules as frames, tensors as boxes, groups as colours."""
    from shear_backends.draw import draw
    from shear_backends.draw.render import FORMATS
    from shear_ir.plans import Plan
    from shear_tools.api import pipeline

    console.refuse_file(out, *(f".{kind}" for kind in FORMATS))
    ready = None if plan is None else Plan.load(plan)
    with console.Steps("loading", "tracing", "analysing", "drawing") as step:
        with step("loading"):
            loaded = open_model(model, trust_remote_code, inputs=inputs, weights=False)
        with step("tracing"):
            program = pipeline.trace(loaded.model)
        with step("analysing"):
            groups = pipeline.groups(program)
        with step("drawing"):
            draw(program, groups, out, group=group, layers=layers, plan=ready)
    if json:
        console.put_json({"model": model, "out": str(out), "groups": len(groups) if group is None else 1})
    else:
        console.put_lines(f"wrote {out}")
