"""How a model is recovered: the options of one stage."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cache

from shear_ir.errors import PlanError

# They say where and how often, or what is done with the result: none of them changes what a round computes.
_NOT_IN_DIGEST = ("device", "merge", "save_steps")

_MOST = 1e6
"""No step is that large on purpose, and what AdamW makes of a much larger rate is no number in single precision."""


@dataclass(frozen=True)
class Recovery:
    """One stage of recovery; the defaults are LLM-Pruner's recipe, in rounds. Raises ``PlanError`` for a bad value.

    Adapters: ``rank``, ``alpha``, ``dropout``, on all linear projections. A round draws ``rows_per_round`` rows and
    trains on them ``epochs`` times: AdamW, ``lr`` after a ``warmup`` (a share of the round's steps), then by
    ``schedule`` (a name of transformers), ``batch`` rows per step over all processes, ``micro_batch`` at a time.
    The same adapters go from round to round; optimizer and schedule begin anew, so that each round ends with a low
    rate and what is measured after it has settled.

    ``dynamic``: weigh sources by degradation, else evenly; ``floor``: the share that is even in any case. It stops
    after ``max_rounds``, at ``token_budget`` tokens, or when the mean loss got better by less than the share
    ``tolerance`` in ``patience`` rounds running. ``merge``: adapters are merged at the end.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    lr: float = 1e-4
    batch: int = 64
    micro_batch: int | None = None
    rows_per_round: int = 2048
    epochs: int = 2
    warmup: float = 0.05
    schedule: str = "linear"
    weight_decay: float = 0.0
    dynamic: bool = True
    floor: float = 0.2
    max_rounds: int = 8
    token_budget: int | None = None
    tolerance: float = 0.005
    patience: int = 2
    merge: bool = True
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    device: str | None = None
    save_steps: int = 50
    eval_batch: int = 8

    def __post_init__(self) -> None:
        counts = ("rank", "batch", "micro_batch", "rows_per_round", "epochs", "max_rounds", "token_budget", "patience",
                  "save_steps", "eval_batch")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name} of a recovery is at least 1, not {value}")
        for name in ("dropout", "warmup", "floor", "tolerance"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise PlanError(f"{name} of a recovery is a share between 0 and 1, not {value}")
        for name in ("lr", "alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise PlanError(f"{name} of a recovery is a positive number, not {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise PlanError(f"weight_decay of a recovery is a number from 0 up, not {self.weight_decay}")
        for name in ("lr", "alpha", "weight_decay"):
            value = getattr(self, name)
            if value > _MOST:
                raise PlanError(f"{name} of a recovery is at most {_MOST:,.0f}, not {value}")
        if not 0 <= self.seed < 2**31:
            raise PlanError(f"seed of a recovery is a whole number from 0 to 2**31 - 1, not {self.seed}")
        self._check_names()

    def _check_names(self) -> None:
        known = _schedules()
        if self.schedule not in known:
            raise PlanError(f"there is no schedule '{self.schedule}'; there are {', '.join(known)}")
        if self.device not in (None, "cpu", "cuda"):
            raise PlanError(f"a recovery runs on cpu or cuda, not on '{self.device}'")

    @property
    def digest(self) -> str:
        """A hash of the options that change the result."""
        told = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _schedules() -> list[str]:
    """The schedules of transformers that a warm-up and a number of steps describe: others need more options."""
    import torch
    from transformers import SchedulerType, get_scheduler

    able = []
    for kind in SchedulerType:
        tried = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        try:
            made = get_scheduler(kind, tried, num_warmup_steps=1, num_training_steps=2)
        except (TypeError, ValueError):
            continue
        # Those that wait for a measured loss have no rate of their own for a step.
        if isinstance(made, torch.optim.lr_scheduler.LambdaLR):
            able.append(kind.value)
    return able
