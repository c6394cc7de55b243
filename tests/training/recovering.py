"""A sheared tiny Llama, sources it can learn, and a recovery of it; run as a program it kills itself on the way."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

import shear_ir as sir
from shear_training.data import Source
from shear_training.evaluate import evaluate_sources
from shear_training.recovery import Recovered, Recovery, recover
from shear_training.rows import Rows, stacked
from tests.zoo import FAMILIES

LENGTH = 12
SMALL = Recovery(
    rank=4, alpha=8, dropout=0.1, lr=3e-2, batch=8, micro_batch=4, rows_per_round=16, epochs=2, max_rounds=2, save_steps=2,
    tolerance=0.0, device="cpu",
)  # fmt: skip
"""Two rounds of four steps, each with two complete checkpoints on the way."""

Progress = Callable[[str, int, int], None]


def counting(step: int, count: int, start: int) -> Rows:
    """Rows that count up by ``step``; every third is cut short."""
    rows = [[3 + (start + i + step * j) % 40 for j in range(LENGTH - 4 * (i % 3 == 2))] for i in range(count)]
    return stacked([(ids, [True] * len(ids)) for ids in rows], LENGTH, 0)


def sources() -> dict[str, Source]:
    return {
        name: Source(name, counting(step, 20, 0), counting(step, 6, 20)) for name, step in {"up": 1, "by3": 3}.items()
    }


@functools.cache
def _small() -> nn.Module:
    torch.manual_seed(0)
    dense = FAMILIES["llama_gqa"]()
    return sir.shear(dense, sir.plan(sir.trace(dense), ratio=0.2))


def small() -> nn.Module:
    """The same sheared model every time."""
    return copy.deepcopy(_small())


def dense() -> Mapping[str, float]:
    """As if the dense model knew one source well, the other less so."""
    return {"up": 1.0, "by3": 3.0}


def losses(model: nn.Module) -> dict[str, float]:
    return {name: loss.nll for name, loss in evaluate_sources(model, sources()).items()}


def run(
    folder: Path, settings: Recovery = SMALL, progress: Progress | None = None, model: nn.Module | None = None
) -> Recovered:
    return recover(model or small(), sources(), dense(), settings, folder, progress=progress)


def stopper(what: str, at: int, stop: Callable[[], None]) -> Progress:
    """Stops a run at step ``at`` of ``what``."""

    def progress(said: str, done: int, total: int) -> None:
        if said.endswith(what) and done == at:
            stop()

    return progress


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), progress=stopper("round 2", 3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
