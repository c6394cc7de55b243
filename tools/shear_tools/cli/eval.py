"""``shear-ir eval``: the loss of a model on held-out text, source by source, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shear_ir.errors import PlanError
from shear_tools.cli import console, options
from shear_tools.cli.models import open_language_model

if TYPE_CHECKING:
    from shear_training.evaluate import Loss
    from shear_training.harness import TaskScore


def eval(
    model: options.ModelArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A data.yaml, measured on its validation rows, or one file, on all of it.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK", help="A task of lm-evaluation-harness, as in 'arc_*'; repeatable, or with commas.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task.", show_default="all", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Rows per forward pass.", min=1)] = 8,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    device: options.DeviceOption = None,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:  # fmt: skip
    """Measure MODEL: nats per token and perplexity on each source of text, accuracy on tasks.

    Only forward passes are run. Tasks need the extra shear-ir[eval] and fetch their data from the hub.
    """
    names = [name for given in tasks or () for name in given.split(",") if name]
    if data is None and not names:
        raise PlanError("give --data FILE, --tasks TASK or both, which say what to measure on")
    from shear_training.data import held_out, load_data
    from shear_training.evaluate import evaluate_sources, require_readable
    from shear_training.harness import require_harness, run_tasks

    config = None if data is None else load_data(data, whole=True)
    if names:
        require_harness()
    losses: dict[str, Loss] = {}
    scores: list[TaskScore] = []
    with console.Told() as told:
        told("loading", 0, 1)
        loaded, tokenizer = open_language_model(model, trust_remote_code, dtype, device)
        if config is not None:
            rows = held_out(config, tokenizer, told)
            require_readable(loaded.model, rows)
            losses = evaluate_sources(loaded.model, rows, batch=batch, bf16=bf16, progress=told)
        if names:
            told("running tasks", 0, 1)
            scores = run_tasks(loaded.model, tokenizer, names, batch=batch, limit=limit)
    for name, loss in losses.items():
        if not math.isfinite(loss.nll):
            console.warn(f"the loss on {name} is no number: the model's outputs are not finite there")
    if json:
        console.put_json(_document(model, losses, scores))
    else:
        _put(losses, scores)


def _document(model: str, losses: dict[str, Loss], scores: list[TaskScore]) -> dict[str, Any]:
    sources = {name: asdict(loss) | {"perplexity": loss.perplexity} for name, loss in losses.items()}
    return {"model": model, "sources": sources, "tasks": [asdict(score) for score in scores]}


def _put(losses: dict[str, Loss], scores: list[TaskScore]) -> None:
    if losses:
        rows = [
            (name, f"{loss.tokens:,}", f"{loss.nll:.4f}", f"{loss.perplexity:.2f}") for name, loss in losses.items()
        ]
        headings = ("source", "tokens", "nats per token", "perplexity")
        console.put_table(console.table("loss on held-out text", headings, rows, headings[1:]))
    if scores:
        lines = [(s.task, s.metric, f"{s.value:.4f}", "" if s.stderr is None else f"± {s.stderr:.4f}") for s in scores]
        console.put_table(console.table("tasks", ("task", "measure", "value", ""), lines, ("value", "")))
