"""``shear-ir dump``: the text IR with the names of axes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shear_tools.cli import console, options
from shear_tools.cli.models import open_model


def dump(
    model: options.ModelArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to this file.", show_default=False)
    ] = None,
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:
    """Print MODEL as text: one line per operator, each dim by the axis it is, the groups in a table below."""
    console.refuse_file(out)
    from shear_passes.analysis.dump import Dump
    from shear_tools.api import pipeline

    with console.Steps("loading", "tracing", "analysing") as step:
        with step("loading"):
            loaded = open_model(model, trust_remote_code, dtype, inputs, weights=False)
        with step("tracing"):
            program = pipeline.trace(loaded.model)
        with step("analysing"):
            text = pipeline.analyses(program).get(Dump())
    if out is not None:
        console.write_file(out, f"{text}\n")
    if json:
        console.put_json({"model": model, "class": program.owner, "out": str(out) if out else None, "text": text})
    elif out is None:
        console.put_lines(text)
