"""``shear-ir explain``: the operators and source lines that tie slices together, or that froze them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shear_tools.cli import console, options
from shear_tools.cli.models import open_model


def explain(
    model: options.ModelArgument,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", show_default=False, help="A group, a parameter, or parameter:dim with dims counted from 0."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Draw it: a .svg, .png, .pdf or .dot file.", show_default=False
        ),
    ] = None,
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Say why the slices of NAME leave together, or why they cannot leave: the shortest chains of operators."""
    from dataclasses import asdict

    from shear_backends.draw import draw_explanation
    from shear_backends.draw.render import FORMATS
    from shear_tools.api import pipeline

    console.refuse_file(out, *(f".{kind}" for kind in FORMATS))
    with console.Steps("loading", "tracing", "explaining") as step:
        with step("loading"):
            loaded = open_model(model, trust_remote_code, inputs=inputs, weights=False)
        with step("tracing"):
            program = pipeline.trace(loaded.model)
        with step("explaining"):
            found = pipeline.explain(program, name)
            if out is not None:
                draw_explanation(found, out)
    if json:
        proofs = [asdict(proof) for proof in found.proofs]
        drawn = str(out) if out else None
        console.put_json({"model": model, "class": found.owner, "name": name, "out": drawn, "proofs": proofs})
    else:
        console.put_lines(str(found) if out is None else f"wrote {out}")
