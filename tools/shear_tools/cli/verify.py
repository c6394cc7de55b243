"""``shear-ir verify``: a saved model against the original whose removed units are masked to zero."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from shear_ir.errors import ShearError
from shear_tools.cli import console, options
from shear_tools.cli.change import changed
from shear_tools.cli.models import open_model, open_sheared

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from shear_ir.frontend.load import LoadedModel


def verify(
    model: options.ModelArgument,
    out: options.OutArgument,
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:
    """Compare OUT with MODEL, the model it was pruned from, on random inputs of two lengths.

    Exit code 0: OUT computes what MODEL with its removed units masked to zero computes. 1: it does not. Half precision
    is compared in float32.
    """
    from shear_backends.store.adapter import ADAPTERS
    from shear_backends.store.record_file import PLAN_FILE, require_sheared
    from shear_ir.plans import Plan
    from shear_tools.api import pipeline

    require_sheared(out)
    whole = out / ADAPTERS / PLAN_FILE
    plan = Plan.load(whole if whole.is_file() else out / PLAN_FILE)
    made = changed(dict(plan.options))
    if made:
        raise ShearError(
            f"the weights of {out} are not those of {model}: prune changed them by {', '.join(made)}, and compared the "
            "result with the model it had changed before it saved it"
        )
    with console.Steps("loading", "tracing", "verifying") as step:
        with step("loading"):
            dense = open_model(model, trust_remote_code, dtype, inputs)
        if dense.config_only:
            raise ShearError(f"{model} has no weights, only a config: there is nothing to compare with")
        with step("tracing"):
            pipeline.planned_program(dense.model, plan)
        with step("verifying"):
            found = pipeline.verify(dense.model, _small(out, dense, trust_remote_code), plan)
    if json:
        console.put_json({"model": model, "out": str(out), **asdict(found), "sound": found.sound, "ratio": plan.ratio})
    else:
        console.put_lines(f"{found}", f"{plan.ratio:.1%} of the parameters are gone ({len(plan.cuts)} groups cut)")
    if not found.sound:
        raise typer.Exit(1)


def _small(out: Path, dense: LoadedModel, trust: bool) -> nn.Module:
    """OUT as its users load it: with the dense model's help only where its class needs that."""
    import transformers

    from shear_ir.frontend.base import has_adapters, plain_base

    base = plain_base(dense.model) if has_adapters(dense.model) else dense.model
    alone = dense.source is not None and hasattr(transformers, type(base).__name__)
    return open_sheared(out, None if alone else base, trust)
