"""What a recovery has done so far, kept in its folder: rounds, the state of the sampler, which adapter is best."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from shear_ir.errors import PlanError
from shear_ir.reading import Unreadable, document_in
from shear_ir.writing import write_text

STATE_FILE = "state.json"
_SAMPLE = 64
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number to the whole numbers of as many."""


@dataclass(frozen=True)
class Round:
    """One round. ``before`` and ``after``: NLL per source in nats per token on held-out rows; ``deviations``: what
    ``before`` lacks to the dense model; ``weights``, ``rows``: the mixture; ``tokens``: trained on, without padding."""

    number: int
    before: Mapping[str, float]
    deviations: Mapping[str, float]
    weights: Mapping[str, float]
    rows: Mapping[str, int]
    after: Mapping[str, float]
    tokens: int
    steps: int
    seconds: float

    @property
    def loss(self) -> float:
        """The mean NLL over the sources after the round."""
        return mean(self.after)


def mean(losses: Mapping[str, float]) -> float:
    """The mean of a loss per source: each counts the same."""
    return sum(losses.values()) / len(losses)


@dataclass
class Journal:
    """The state of one stage. ``digests``: what it belongs to; ``baseline``: NLL per source before the first round;
    ``drawn``: the sampler's state; ``best``: number of the best round, 0 for the model as it was;
    ``stopped``: why it ended, None while it has not."""

    digests: dict[str, str]
    baseline: dict[str, float] | None = None
    rounds: list[Round] = field(default_factory=list)
    drawn: dict[str, int] = field(default_factory=dict)
    best: int = 0
    stopped: str | None = None

    @classmethod
    def open(cls, folder: Path, digests: dict[str, str]) -> Journal:
        """The journal in ``folder``, or a new one; raises ``PlanError`` when it is of another recovery."""
        path = folder / STATE_FILE
        if not path.is_file():
            return cls(digests)
        try:
            read = document_in(path, _Document, infinite=True)
        except Unreadable as failure:
            raise PlanError(f"{path} is no state of a recovery: {failure}") from failure
        for name, digest in digests.items():
            if read.digests.get(name) != digest:
                raise PlanError(
                    f"{folder} holds a recovery that was begun with other {name}: remove the folder to begin anew, or "
                    "give what it was begun with"
                )
        return cls(read.digests, read.baseline, read.rounds, read.drawn, read.best, read.stopped)

    def save(self, folder: Path) -> None:
        """Write it whole or not at all, and remove what is not needed any more."""
        write_text(
            folder / STATE_FILE, _Document(format="shear-ir recovery 1", **asdict(self)).model_dump_json(indent=1)
        )
        needed = {self.adapter(folder, number) for number in (len(self.rounds), self.best)}
        for path in folder.glob("adapter-*.safetensors"):
            if path not in needed:
                path.unlink()
        for path in folder.glob("round-*"):
            if self.stopped is not None or int(path.name.rpartition("-")[2]) <= len(self.rounds):
                shutil.rmtree(path)

    @staticmethod
    def adapter(folder: Path, number: int) -> Path:
        """Where the adapter is that round ``number`` left."""
        return folder / f"adapter-{number}.safetensors"


def weights_digest(model: nn.Module) -> str:
    """A hash of names, types, shapes, first numbers and sums of all parameters: another plan or model gives another."""
    made = hashlib.sha256()
    for name, parameter in model.named_parameters():
        made.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        some = flat[:_SAMPLE].cpu().contiguous()
        made.update(some.view(torch.uint8).numpy().tobytes())
        # Whole numbers add up to the same in any order, on any device.
        made.update(str(int(flat.view(_WHOLE[flat.element_size()]).sum(dtype=torch.int64))).encode())
    return made.hexdigest()[:16]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["shear-ir recovery 1"]
    digests: dict[str, str]
    baseline: dict[str, float] | None
    rounds: list[Round]
    drawn: dict[str, int]
    best: int
    stopped: str | None
