"""Tasks of lm-evaluation-harness on a model in memory: zero-shot accuracy and the like (the ``eval`` extra)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shear_ir.errors import LoadError


@dataclass(frozen=True)
class TaskScore:
    """One measure of one task, such as ``acc``; ``stderr``: its standard error, None where there is none."""

    task: str
    metric: str
    value: float
    stderr: float | None


def require_harness() -> None:
    """Raise ``LoadError`` unless the harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LoadError("tasks need lm-evaluation-harness, which is not installed: pip install 'shear-ir[eval]'")


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, batch: int = 8, limit: int | None = None,
    manager: Any = None,
) -> list[TaskScore]:  # fmt: skip
    """Every measure of ``tasks``, names or globs of the harness, on ``model``, where it is.

    ``limit``: examples per task, all when None. ``manager``: its ``TaskManager``, one that knows the built-in tasks
    when None. Raises ``LoadError`` for a task that there is not, or whose data cannot be had.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = TaskManager() if manager is None else manager
    names = sorted({name for task in tasks for name in _matches(known, task)})
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(next(model.parameters()).device))
    training = model.training
    try:
        found = simple_evaluate(
            model=wrapped, tasks=names, task_manager=known, limit=limit, bootstrap_iters=1000, log_samples=False,
            verbosity=logging.ERROR,
        )  # fmt: skip
    except Exception as failure:  # tasks run code of their own, and fetch their data
        said = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise LoadError(f"the tasks {', '.join(names)} cannot be run: {said}") from failure
    finally:
        model.train(training)
    return [
        score for name, results in (found or {"results": {}})["results"].items() for score in _scores(name, results)
    ]


def _matches(manager: Any, task: str) -> list[str]:
    names: list[str] = list(manager.match_tasks([task]))
    if not names:
        raise LoadError(f"lm-evaluation-harness has no task {task}")
    return names


def _scores(task: str, results: dict[str, Any]) -> list[TaskScore]:
    """The harness names a measure ``acc,none`` and its error ``acc_stderr,none``."""
    made = []
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = results.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            made.append(TaskScore(task, name, float(value), float(error) if isinstance(error, int | float) else None))
    return made
