"""Scoring units by data: what ``--data``, ``--samples`` and ``--device`` say, and the plan that comes of it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shear_ir.errors import LoadError, PlanError
from shear_tools.cli import console

if TYPE_CHECKING:
    from torch import nn

    from shear_ir.frontend.load import LoadedModel
    from shear_ir.plans import Plan
    from shear_ir.program import Program
    from shear_tools.cli.options import Device


@dataclass(frozen=True)
class ReadOptions:
    """Rows of text to judge units by: ``samples`` of ``file``, all in all, run on ``device``."""

    file: Path
    samples: int | None = None
    device: Device | None = None


def require_data(name: str, read: ReadOptions | None, seed: int = 0) -> None:
    """Raise ``PlanError`` for a criterion that does not exist, or that looks at data where there is none."""
    from shear_passes.importance import criterion

    if criterion(name, seed).statistics() and read is None:
        raise PlanError(f"{name} looks at data: give --data FILE, or --importance magnitude")


def planned(
    loaded: LoadedModel,
    program: Program,
    step: console.Steps,
    read: ReadOptions | None,
    trust: bool,
    choices: dict[str, Any],
) -> Plan:
    """The plan by the criterion that was chosen."""
    from shear_passes.analysis.block_groups import BLOCK_KINDS
    from shear_passes.importance import default
    from shear_tools.api import planning

    # Blocks have a default of their own.
    kinds = choices.get("kinds", ())
    blocks = choices.get("ratio") is None or (kinds and all(kind in BLOCK_KINDS for kind in kinds))
    choices = choices if blocks else {"importance": default(read), **choices}
    if read is None:
        return planning.plan(program, **choices)
    data = batches(loaded, step, read, trust, choices.get("seed", 0))
    with on_device(loaded.model, read):
        return planning.plan(program, data=data, progress=telling(step, "scoring"), **choices)


def telling(step: console.Steps, what: str) -> Callable[[int, int | None], None]:
    """Progress of ``what`` over batches."""
    return lambda done, all_: step.tell(what, done, all_)


@contextmanager
def on_device(model: nn.Module, read: ReadOptions) -> Iterator[None]:
    """``model`` where ``--device`` says; it is on the CPU again afterwards."""
    model.to(_device(read))
    try:
        yield
    finally:
        model.to("cpu")


def batches(loaded: LoadedModel, step: console.Steps, read: ReadOptions, trust: bool, seed: int) -> Any:
    """The rows of ``--data`` in batches that the model reads."""
    from shear_tools.cli.models import open_tokenizer
    from shear_tools.workflow.calibration import SAMPLES, calibration_batches
    from shear_training.evaluate import require_readable

    if loaded.config_only:
        raise LoadError(f"{loaded.spec} has no weights, only a config: it cannot be run on data")
    if loaded.source is None:
        raise LoadError(f"{loaded.spec} has no folder with a tokenizer, so it cannot read the text of --data")
    tokenizer = open_tokenizer(loaded.source, trust)
    batches, sources = calibration_batches(
        read.file, tokenizer, samples=read.samples or SAMPLES, seed=seed, progress=step.tell
    )
    require_readable(loaded.model, sources)
    del tokenizer, sources
    _give_back()
    return batches


def _give_back() -> None:
    """Hand back to the system what tokenizers and readers have freed, which the C library of Linux would keep."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _device(read: ReadOptions) -> str:
    import torch

    if read.device == "cuda" and not torch.cuda.is_available():
        raise LoadError("--device cuda: torch sees no GPU here")
    return "cuda" if read.device != "cpu" and torch.cuda.is_available() else "cpu"
