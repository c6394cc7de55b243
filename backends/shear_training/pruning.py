"""Progressive pruning as a training run: adapters, LHSPG under Trainer, and the units that are zero at its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import nn

from shear_ir.errors import PlanError
from shear_ir.frontend.adapters import find_adapters
from shear_ir.plans import Plan
from shear_passes.analysis.find_groups import Groups
from shear_passes.importance.names import criterion
from shear_training.callback import LHSPGCallback
from shear_training.data import Source
from shear_training.lhspg import LHSPG
from shear_training.lora import adapter_tensors, as_it_was, attach, detach
from shear_training.mixture import Sampler, counts, shuffled
from shear_training.rounds import Diverged, train
from shear_training.rows import Rows
from shear_training.saliency import DEFAULT_WEIGHTS, SALIENCIES, Measured, check_weights, measured_names
from shear_training.schedule import Periods
from shear_training.settings import Recovery

# They say where and how often: none of them changes what a run computes.
_NOT_IN_DIGEST = ("device", "save_steps")


@dataclass(frozen=True)
class Pruning:
    """How units are brought to zero. Raises ``PlanError`` for a bad value.

    Adapters: ``rank`` and ``alpha``, on all linear projections (a model that has adapters keeps its own); AdamW with
    ``lr`` after a warm-up of ``lr_warmup`` (a share of the steps), then by ``schedule`` (a name of transformers);
    ``batch`` rows per step over all processes, ``micro_batch`` at a time. ``warmup``, ``periods``, ``steps`` and
    ``eps`` are those of ``Periods``; ``criteria`` weighs those of ``saliency``, and any of ``shear_ir.scores`` by name,
    measured on ``calibration`` rows before the training. ``compete``: units of a kind compete across layers.
    ``repair``: with ``least-squares``, the weights from before the training are cut to the chosen units too, repaired
    on the same rows, and taken where their loss is lower.
    """

    rank: int = 8
    alpha: float = 16.0
    lr: float = 3e-4
    schedule: str = "constant_with_warmup"
    lr_warmup: float = 0.05
    batch: int = 16
    micro_batch: int | None = None
    warmup: int = 20
    periods: int = 5
    steps: int = 20
    eps: float = 0.0
    criteria: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    compete: bool = False
    calibration: int = 128
    repair: Literal["none", "least-squares"] = "none"
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    device: str | None = None
    save_steps: int = 50

    def __post_init__(self) -> None:
        for name in measured_names(self.criteria):
            self._require_criterion(name)
        check_weights(self.criteria, measured_names(self.criteria))
        if self.repair not in ("none", "least-squares"):
            raise PlanError(f"there is no repair '{self.repair}'; there are none, least-squares")
        if self.calibration < 1:
            raise PlanError(f"rows to calibrate on are a number from 1 up, not {self.calibration}")
        self.course()
        self.training()

    def _require_criterion(self, name: str) -> None:
        try:
            criterion(name)
        except PlanError as failure:
            raise PlanError(
                f"there is no saliency criterion '{name}'; there are {', '.join(SALIENCIES)}, and those of "
                f"--importance, of which {failure}"
            ) from failure

    def course(self) -> Periods:
        """When units go."""
        return Periods(self.warmup, self.periods, self.steps, self.eps)

    def training(self) -> Recovery:
        """The same run as options of a round, which check themselves."""
        return Recovery(
            rank=self.rank, alpha=self.alpha, dropout=0.0, lr=self.lr, batch=self.batch, micro_batch=self.micro_batch,
            warmup=self.lr_warmup, schedule=self.schedule, seed=self.seed, bf16=self.bf16, device=self.device,
            gradient_checkpointing=self.gradient_checkpointing, torch_compile=self.torch_compile,
            save_steps=self.save_steps,
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """A hash of the options that change the result."""
        told = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Pruned:
    """``model``: without adapters, chosen units exactly zero; ``kept``: group name to its sorted units that stay;
    ``steps`` and ``tokens`` that it took."""

    model: nn.Module
    kept: Mapping[str, npt.NDArray[np.int64]]
    steps: int
    tokens: int


def prune(
    model: nn.Module, groups: Groups, target: Plan, sources: Mapping[str, Source], settings: Pruning,
    folder: str | Path, progress: Callable[[int, int], None] | None = None, scores: Measured | None = None,
) -> Pruned:  # fmt: skip
    """Train ``model`` in place until as many units of each group are zero as ``target`` removes.

    ``groups``: those of the traced ``model``. ``sources``: rows to train on, drawn evenly. ``folder``: keeps Trainer's
    checkpoints; the same call goes on from the last one, and on a CPU ends with the same bits. ``scores``: those of
    the criteria that are measured. Raises ``PlanError`` for what LHSPG cannot prune, and when the training loss is no
    number.
    """
    rows = {name: source.train for name, source in sources.items()}
    with as_it_was(model):
        own = isinstance(model, PeftModel)
        adapted = model if isinstance(model, PeftModel) else attach(
            model, rank=settings.rank, alpha=settings.alpha, dropout=0.0, seed=settings.seed
        )  # fmt: skip
        try:
            made = _train(adapted, groups, target, rows, settings, Path(folder), progress, scores)
        except BaseException as failure:
            if not own:
                detach(adapted, merge=False)
            if isinstance(failure, Diverged):
                raise PlanError(f"{failure}: pruning stops here; a lower lr may help") from failure
            raise
        return replace(made, model=detach(adapted, merge=True).eval())


def _train(
    model: PeftModel, groups: Groups, target: Plan, rows: Mapping[str, Rows], settings: Pruning, folder: Path,
    progress: Callable[[int, int], None] | None, scores: Measured | None,
) -> Pruned:  # fmt: skip
    course = settings.course()
    _wake(model)
    inside = torch.optim.AdamW(adapter_tensors(model).values(), lr=settings.lr, weight_decay=0.0)
    optimizer = LHSPG.from_plan(
        inside, model, groups, target, course, criteria=settings.criteria, compete=settings.compete, scores=scores
    )  # fmt: skip
    even = counts({name: 1.0 / len(rows) for name in rows}, course.total * settings.batch)
    sampler = Sampler({name: len(each) for name, each in rows.items()}, settings.seed)
    drawn = shuffled(sampler.draw(even), 1, settings.seed, 0)
    steps = train(
        model, rows, drawn, settings.training(), folder, progress, optimizer=optimizer,
        callbacks=[LHSPGCallback(optimizer)],
    )  # fmt: skip
    kept = {} if optimizer.units is None else {
        g.name: stay for g, stay in optimizer.units.kept(optimizer.redundant).items()
    }  # fmt: skip
    return Pruned(model, kept, steps, sum(int(rows[name].lengths[row]) for name, row in drawn))


def _wake(model: PeftModel) -> None:
    """Adapters that a user brings: trained, and without dropout, under which units cannot be projected."""
    for adapter in find_adapters(model):
        if adapter.active:
            for factor in adapter.factors:
                factor.requires_grad_(True)
            if adapter.name in adapter.layer.lora_dropout:
                adapter.layer.lora_dropout[adapter.name] = nn.Identity()
