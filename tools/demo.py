"""The main job on real weights: prune a small and a larger language model, and measure what that did.

    tools/demo            # makes the environment first
    python tools/demo.py  # inside of it

1. The bundled tiny-llama, a look in under a minute: groups, a plan for 20 % fewer parameters by magnitude, the
   smaller model verified, saved, reloaded by stock transformers and measured, a picture.
2. SmolLM2-135M-Instruct, which tools/fetch_models fetches: one command prunes 20 % by FLAP and repairs by least
   squares, with the prose and code of tools/make_texts; then the same measures on text that neither saw.

Nothing is trained here: recovery is a separate step.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import shear_ir as sir
from fetch_models import FetchError, fetch
from make_texts import TextError, make
from shear_backends.draw import draw
from shear_ir.errors import ShearError
from shear_ir.frontend.load import load_model, quiet
from shear_tools.workflow.measure import compare_speed, sample
from shear_training.data import held_out, load_data
from shear_training.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tools" / "assets" / "tiny-llama"
RATIO = 0.2
ROWS = 32
"""Held-out rows of each source to measure on."""
PROMPTS = {"tiny-llama": "    def __init__(self, name, value=None):\n", "SmolLM2": "The largest animals in the sea are"}

console = Console()


# -- the two jobs -----------------------------------------------------------------------------------------------------


def small_model(out: Path) -> dict[str, Any]:
    """Prune, verify and save the bundled model, step by step in Python."""
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(SMALL)
    with timed() as took:
        program = sir.trace(model)
        groups = sir.groups(program)
    analysed = took()
    show_groups(groups)
    with timed() as took:
        plan = sir.plan(program, ratio=RATIO, importance="magnitude")
        small = sir.shear(model, plan)
    cut = took()
    sir.verify(model, small, plan).raise_if_unsound()
    saved = sir.save(small, out / "tiny-llama", source=SMALL)
    picture = draw(program, groups, out / "tiny-llama.svg", plan=plan)
    found = {
        "model": "tiny-llama", "how": "by magnitude, without data", "groups": len(groups),
        "prunable_groups": len(groups.prunable), "stock": saved.stock, "picture": shown(picture),
        "seconds": {"analysis": analysed, "plan and shear": cut}, **measured("tiny-llama", SMALL, saved.path,
                                                                              SMALL / "data.yaml"),
    }  # fmt: skip
    show_model(found)
    return found


def real_model(out: Path) -> dict[str, Any]:
    """Prune SmolLM2 by the command that users type; raises ``FetchError`` or ``TextError`` where it is not at hand."""
    console.print("fetching SmolLM2-135M-Instruct, and prose and code to judge it by (once)")
    dense, data, small = fetch("smollm2"), make(), out / "smollm2"
    options = ["--data", shown(data), "--samples", "64", "--importance", "flap", "--repair", "least-squares"]
    command = ["prune", shown(dense), "--ratio", f"{RATIO:g}", *options, "-o", shown(small)]
    typed = shlex.join(["shear-ir", *command]).replace(f"{out.name}/", f"{out.name.removesuffix('.new')}/")
    console.print(f"$ {typed}", markup=False, highlight=False, soft_wrap=True)
    run = [sys.executable, "-m", "shear_tools", *command, "--json"]
    with timed() as took:
        done = subprocess.run(run, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ShearError("SmolLM2 could not be pruned, as is said above")
    told = json.loads(done.stdout)
    found = {
        "model": "SmolLM2", "how": "by FLAP, repaired by least squares", "stock": told["stock"],
        "verified": told["verified"], "seconds": {"the command": took()}, **measured("SmolLM2", dense, small, data),
    }  # fmt: skip
    show_model(found)
    return found


# -- measures ---------------------------------------------------------------------------------------------------------


def measured(name: str, dense: Path, pruned: Path, data: Path) -> dict[str, Any]:
    """What both folders are and do, by ``dense`` and ``pruned``: sizes, speeds, perplexity by source, a sentence."""
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(dense)
        both = {key: load_model(str(folder)).model for key, folder in (("dense", dense), ("pruned", pruned))}
    sources = {source: rows[:ROWS] for source, rows in held_out(load_data(data), tokenizer).items()}
    sources.pop("instructions", None)  # made of the other texts
    ids = next(iter(sources.values())).ids[:4, :128].long()
    speeds = dict(zip(both, compare_speed(list(both.values()), ids, new_tokens=16), strict=True))
    prompt = tokenizer(PROMPTS[name], add_special_tokens=False)["input_ids"]
    if name == "tiny-llama":
        prompt = [tokenizer.bos_token_id, *prompt]  # as it was trained
    return {
        "parameters": {key: sum(p.numel() for p in model.parameters()) for key, model in both.items()},
        "megabytes": {key: megabytes(model) for key, model in both.items()},
        "tokens read per second": {key: speed.forward for key, speed in speeds.items()},
        "tokens written per second": {key: speed.generate for key, speed in speeds.items()},
        "perplexity": {
            source: {key: evaluate(model, rows, batch=4).perplexity for key, model in both.items()}
            for source, rows in sources.items()
        },
        "samples": {key: sample(model, tokenizer, prompt, 32) for key, model in both.items()},
        "saved": shown(pruned),
    }


def megabytes(model: nn.Module) -> float:
    """Of the weights in memory; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


@contextlib.contextmanager
def timed() -> Iterator[Any]:
    """Gives a function that says how many seconds its block took."""
    started = time.perf_counter()
    taken: list[float] = []
    yield lambda: taken[0]
    taken.append(time.perf_counter() - started)


def shown(path: Path) -> str:
    """A path as people type it: relative to the working directory where it is below it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path.resolve())


# -- tables -----------------------------------------------------------------------------------------------------------


def show_groups(groups: Any) -> None:
    """Groups of one kind in one line."""
    made = Table(
        title="tiny-llama: what can go together, and the parameters a unit has", title_justify="left", show_edge=False
    )
    for column, side in (("kind", "left"), ("groups", "right"), ("units", "right"), ("tensors", "right"),
                         ("per unit", "right"), ("state", "left")):  # fmt: skip
        made.add_column(column, justify=side, no_wrap=column != "state")  # type: ignore[arg-type]
    alike: dict[tuple[str, int, int, int, str], int] = {}
    for group in groups:
        if group.parameters_per_unit:
            state = "prunable" if group.prunable else f"frozen: {group.reason.partition(' at %')[0]}"
            key = (group.kind, group.size, len(group.parameters), group.parameters_per_unit, state)
            alike[key] = alike.get(key, 0) + 1
    for (kind, size, tensors, per_unit, state), count in alike.items():
        made.add_row(kind, str(count), f"{size:,}", str(tensors), f"{per_unit:,}", state)
    console.print(made)
    console.print()


def show_model(found: Mapping[str, Any]) -> None:
    """What a model was and is."""
    numbers = found["parameters"]
    removed = 1 - numbers["pruned"] / numbers["dense"]
    console.print(f"\n{found['model']}: {removed:.1%} of its parameters removed {found['how']}", soft_wrap=True)
    made = Table(show_edge=False)
    for column in ("", "dense", "pruned", "ratio"):
        made.add_column(column, justify="right" if column else "left")
    rows: dict[str, tuple[Mapping[str, float], str]] = {
        "parameters": (numbers, ",.0f"),
        "MB": (found["megabytes"], ".1f"),
        "tokens read per second": (found["tokens read per second"], ",.0f"),
        "tokens written per second": (found["tokens written per second"], ",.0f"),
        **{f"perplexity, {source}": (values, ".2f") for source, values in found["perplexity"].items()},
    }
    for name, (values, form) in rows.items():
        dense, pruned = values["dense"], values["pruned"]
        made.add_row(name, format(dense, form), format(pruned, form), f"{pruned / dense:.2f}")
    console.print(made)
    loader = "AutoModelForCausalLM.from_pretrained" if found["stock"] else "shear_ir.load"
    took = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found["seconds"].items())
    console.print(f"\nproved to be the masked original; {loader} reads it; {took}", soft_wrap=True)
    console.print(
        f"after {PROMPTS[found['model']].strip()!r} each goes on, the likeliest token each time:", soft_wrap=True
    )
    for name, text in found["samples"].items():
        console.print(f"  {name:7}{text!r}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def main(
    out: Annotated[Path, typer.Option(help="Folder for results; what an earlier run wrote there is replaced.")] = ROOT
    / "out"
    / "demo",
    small: Annotated[bool, typer.Option("--small", help="The bundled model alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, tables on stderr.")] = False,
) -> None:
    """Prune two trained models and measure what that did."""
    global console
    if as_json:
        console = Console(stderr=True)
    started = time.perf_counter()
    torch.manual_seed(0)
    # Beside the results and renamed at the end, so that an interrupted run leaves the earlier results whole.
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        document: dict[str, Any] = {"small": small_model(fresh)}
        if not small:
            try:
                document["real"] = real_model(fresh)
            except (FetchError, TextError) as failure:
                console.print(f"SmolLM2 is left out: {failure}", markup=False, soft_wrap=True)
    except ShearError as failure:
        shutil.rmtree(fresh, ignore_errors=True)
        Console(stderr=True).print(str(failure), style="red", markup=False)
        raise typer.Exit(2) from failure
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    document = json.loads(json.dumps(document).replace(f"{fresh.name}/", f"{out.name}/"))
    document["seconds"] = time.perf_counter() - started
    (out / "demo.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"all of it in {document['seconds']:.0f} s; models, plans and a picture are in {shown(out)}")
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
