"""``shear-ir lorashear``: knowledge, LHSPG, shear, recovery and a report, in one command that can be stopped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shear_ir.errors import PlanError
from shear_ir.writing import placeless
from shear_tools.cli import console, options
from shear_tools.cli.models import open_language_model, require_device

if TYPE_CHECKING:
    from shear_tools.workflow.recipe import Recipe
    from shear_tools.workflow.run import Outcome


def lorashear(
    model: options.ModelArgument,
    data: options.DataOption,
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove, between 0 and 1.")] = 0.2,
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write; there whole or not at all.")
    ] = Path("lorasheared"),
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A recipe.yaml with the options of the stages.", show_default=False),
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Leave no group whole, so that stock transformers load the result.")
    ] = False,
    round_to: options.RoundToOption = None,
    kinds: options.KindsOption = None,
    only: options.OnlyOption = None,
    skip: options.SkipOption = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every stage; the recipe's when not given.", show_default=False)
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the stages keep their artefacts.", show_default="OUT.work"),
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
) -> None:
    """Prune MODEL while adapters learn to carry what its units knew, recover it, and write it to OUT with a report.

    The stages: analysis, knowledge distribution, LHSPG, shear, recovery, report. Each keeps what it made in OUT.work;
    the same command goes on where it was stopped, and OUT.work goes when OUT is there. Under accelerate launch it runs
    on several devices.
    """
    if not 0.0 < ratio < 1.0:
        raise PlanError(f"--ratio is a share of the parameters between 0 and 1, not {ratio:g}")
    from shear_backends.store.folder import refuse_existing

    refuse_existing(out, force)
    require_device(device)
    asked = _recipe(
        recipe, stock, trust_remote_code, seed=seed, device=device, bf16=bf16 or None, torch_compile=compile or None,
        gradient_checkpointing=gradient_checkpointing or None,
    )  # fmt: skip
    from shear_tools.workflow.run import lorashear as run
    from shear_training.data import load_data

    load_data(data)
    choices = options.given(round_to=options.steps(round_to), kinds=kinds and tuple(kinds), only=only and tuple(only),
                            skip=skip and tuple(skip))  # fmt: skip
    with console.Told() as told:
        told("loading", 0, 1)
        loaded, tokenizer = open_language_model(model, trust_remote_code, dtype, device)
        made = run(
            loaded.model, tokenizer, out, ratio=ratio, data=data, recipe=asked, work=work, keep_work=keep_work,
            source=loaded.source, force=force, command=_command(), progress=told, **choices,
        )  # fmt: skip
    _put(made, out, json)


def _recipe(path: Path | None, stock: bool, trust: bool, **given: Any) -> Recipe:
    from dataclasses import replace

    from shear_tools.workflow.recipe import Recipe, load_recipe

    made = (Recipe() if path is None else load_recipe(path, trust_remote_code=trust)).with_options(**given)
    made.require_devices()
    if stock and made.allocation != "uniform":
        option = "knowledge.allocate" if made.knowledge.allocate else "pruning.compete"
        raise PlanError(
            f"--stock wants layers of like sizes, and {option} of the recipe makes them unlike: leave one out"
        )
    return replace(made, knowledge=replace(made.knowledge, freeze=0.0)) if stock else made


def _command() -> str:
    return shlex.join(["shear-ir", *map(placeless, sys.argv[1:])])


def _put(made: Outcome, out: Path, json: bool) -> None:
    document = made.report
    if not document:  # one of several processes, and not the one that writes
        return
    if json:
        console.put_json({"out": str(out), **document})
        return
    losses: Mapping[str, Mapping[str, Any]] = document["losses"]
    sources = list(losses["dense"])
    headings = ("model", *sources, "against dense")
    rows = [
        (name, *(f"{found[s]['nll']:.3f} ({found[s]['perplexity']:.1f})" for s in sources),
         f"{100 * document['degradation'][name]:+.1f} %")
        for name, found in losses.items()
    ]  # fmt: skip
    console.put_table(console.table("NLL in nats per token (perplexity)", headings, rows, headings[1:]))
    before, after = document["costs"]["dense"]["parameters"], document["costs"]["sheared"]["parameters"]
    note = f" ({document['note']}; shear_ir.load reads it)" if document["note"] and not document["stock"] else ""
    console.put_lines(
        f"{before:,} parameters became {after:,} ({made.plan.ratio:.1%} gone)",
        f"stock: {'yes' if document['stock'] else 'no'}{note}",
        f"wrote {out}; the report is {out / 'report.md'}",
    )
