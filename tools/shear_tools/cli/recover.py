"""``shear-ir recover``: the stages of recovery on a sheared model; it can be stopped and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shear_ir.errors import PlanError
from shear_tools.cli import console, options
from shear_tools.cli.models import open_language_model, require_device

if TYPE_CHECKING:
    from shear_tools.workflow.recipe import Recipe
    from shear_tools.workflow.recover import Recovered


def recover(
    model: Annotated[
        str, typer.Argument(metavar="OUT", show_default=False, help="A folder that prune or shear_ir.save wrote.")
    ],
    data: options.DataOption,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="RECOVERED", help="The folder to write; there whole or not at all.",
            show_default=False,
        ),
    ],
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that OUT was made of, to measure it.", show_default=False),
    ] = None,
    dense_losses: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Its losses instead, as eval --json prints them for the same data.", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A recipe.yaml with the options of the stages.", show_default=False),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Mix the sources evenly, whatever they lost.")] = False,
    rounds: Annotated[
        int | None, typer.Option(help="At most so many rounds per stage.", show_default="the recipe's", min=1)
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(help="At most so many tokens per stage.", show_default="the recipe's", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the recipe's")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.", show_default="the recipe's", min=0)] = None,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Save the last stage's adapters beside the model, not in it.")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the stages keep their state.", show_default="RECOVERED.work"),
    ] = None,
    keep_work: options.KeepWorkOption = False,
    device: options.DeviceOption = None,
    bf16: options.Bf16Option = False,
    gradient_checkpointing: options.GradientCheckpointingOption = False,
    compile: options.CompileOption = False,
    force: options.ForceOption = False,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:  # fmt: skip
    """Train the sheared model OUT on what it has forgotten most, and write it to RECOVERED.

    Each stage of the data runs in rounds of LoRA fine-tuning: sources that lost more against the dense model get more
    of the next round. The same command goes on where it was stopped. Under accelerate launch it runs on several
    devices.
    """
    if (dense is None) == (dense_losses is None):
        raise PlanError("give either --dense MODEL or --dense-losses FILE, which say what was lost")
    from shear_backends.store.folder import refuse_existing

    refuse_existing(out, force)
    require_device(device)
    asked = _recipe(
        recipe, trust_remote_code, dynamic=False if uniform else None, max_rounds=rounds, token_budget=token_budget,
        lr=lr, seed=seed, device=device, bf16=bf16 or None, gradient_checkpointing=gradient_checkpointing or None,
        torch_compile=compile or None,
    )  # fmt: skip
    from shear_tools.workflow.recover import read_losses, recover_stages
    from shear_training.data import load_data

    config = load_data(data)
    losses = None if dense_losses is None else read_losses(dense_losses)
    with console.Told() as told:
        told("loading", 0, 1)
        loaded, tokenizer = open_language_model(model, trust_remote_code, dtype, device)
        made = recover_stages(
            loaded.model, tokenizer, out, data=config, dense_name=dense or "", recipe=asked, work=work,
            dense=losses or (lambda: open_language_model(dense or "", trust_remote_code, dtype, device)[0].model),
            keep_work=keep_work, keep_adapters=keep_adapters, source=loaded.source, force=force, progress=told,
        )  # fmt: skip
    if json:
        console.put_json(made.to_json())
    else:
        _put(made)


def _recipe(path: Path | None, trust: bool, **given: Any) -> Recipe:
    """The recipe with what the command line says, which holds for every stage."""
    from dataclasses import replace

    from shear_tools.workflow.recipe import Recipe, load_recipe

    made = Recipe() if path is None else load_recipe(path, trust_remote_code=trust)
    chosen = options.given(**given)
    stages = {name: {**values, **chosen} for name, values in made.stages.items()}
    asked = replace(made, recovery=replace(made.recovery, **chosen), stages=stages)
    asked.require_devices()
    return asked


def _put(made: Recovered) -> None:
    dense = made.losses["dense"]
    headings = ("model", *dense)
    rows = [
        (name, *(f"{loss.nll:.3f} ({loss.perplexity:.1f})" for loss in found.values()))
        for name, found in made.losses.items()
    ]
    console.put_table(console.table("NLL in nats per token (perplexity)", headings, rows, headings[1:]))
    for stage in made.stages:
        tokens = sum(told["tokens"] for told in stage["rounds"])
        console.put_lines(
            f"{stage['stage']}: {len(stage['rounds'])} rounds, {tokens:,} tokens, stopped: {stage['stopped']}; "
            f"best: {'round ' + str(stage['best']) if stage['best'] else 'none'}"
        )
    note = f" ({made.saved.note}; shear_ir.load reads it)" if made.saved.note and not made.saved.stock else ""
    console.put_lines(f"stock: {'yes' if made.saved.stock else 'no'}{note}", f"wrote {made.saved.path}")
