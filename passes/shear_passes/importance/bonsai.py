"""Bonsai: which units matter, by regression of the loss on random masks; forward passes only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import Importance, Score, Scored, Scores, Statistic, candidates, parameters_of
from shear_passes.importance.calibration import Calibration, CalibrationStep, Data, Observer, Portion
from shear_passes.importance.substitution import Substitution

UnitMasks = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MaskLosses:
    """``masks``: which units stayed, shape ``(masks, units)``, groups one after another; ``losses``: ``(masks,)``."""

    groups: tuple[Group, ...]
    masks: UnitMasks
    losses: npt.NDArray[np.float64]


@dataclass(frozen=True)
class MaskStatistics(Statistic[MaskLosses]):
    """The mean loss over the data under each of ``count`` random masks that leave the share ``keep`` of each group.

    Units of ``kinds`` are masked, as zeros in all of their slices. One forward pass for each mask and batch.
    """

    count: int = 64
    keep: float = 0.5
    kinds: tuple[str, ...] = ("ffn", "kv_head")
    seed: int = 0

    requires = (FindGroups, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> Observer:
        """Tries every mask after every batch."""
        if self.count < 2 or not 0.0 < self.keep < 1.0:
            raise PlanError("regression on masks needs two masks or more, and a share that they keep between 0 and 1")
        groups = [g for g in candidates(analyses) if g.prunable and g.kind in self.kinds and g.size > 1]
        if not groups:
            raise PlanError(f"the model has no prunable group of the kinds {', '.join(self.kinds)}")
        return _MaskObserver(program, groups, _drawn(groups, self), calibration)


def _drawn(groups: Sequence[Group], asked: MaskStatistics) -> UnitMasks:
    draw = np.random.default_rng(asked.seed)
    parts = []
    for group in groups:
        stays = min(group.size - 1, max(1, round(asked.keep * group.size)))
        order = draw.permuted(np.tile(np.arange(group.size), (asked.count, 1)), axis=1)
        parts.append(order < stays)
    return np.concatenate(parts, axis=1)


class _MaskObserver(Observer):
    needs_loss = True

    def __init__(self, program: Program, groups: Sequence[Group], masks: UnitMasks, calibration: Calibration) -> None:
        self.program, self.groups, self.masks = program, tuple(groups), masks
        self.substitution = Substitution(calibration.model, program, parameters_of(program, groups))
        self.starts = dict(zip(groups, np.cumsum([0, *(g.size for g in groups)]).tolist(), strict=False))
        self.places: dict[str, list[tuple[Group, int, npt.NDArray[np.int64]]]] = {}
        for group in groups:
            for piece in (s for s in group.slices if not s.spared):
                for owner in piece.index_map:
                    self.places.setdefault(piece.parameter, []).append((group, piece.dim, owner))
        self.losses = np.zeros(len(masks))
        self.weight = 0

    def portion(self, calibration: Calibration) -> Portion:
        """Whole batches: every portion costs a forward pass for each mask."""
        return "whole"

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        yield

    def after(self, step: CalibrationStep) -> None:
        for number, mask in enumerate(self.masks):
            with self.substitution.using(lambda name, weight, mask=mask: self._masked(name, weight, mask)):  # type: ignore[misc]
                self.losses[number] += step.weight * step.again()
        self.weight += step.weight

    def _masked(self, name: str, weight: Tensor, mask: npt.NDArray[np.bool_]) -> Tensor:
        made = weight.clone()
        for group, dim, owner in self.places[name]:
            stays = mask[self.starts[group] : self.starts[group] + group.size]
            gone = np.flatnonzero((owner >= 0) & ~stays[owner])
            made.index_fill_(dim, torch.from_numpy(gone).to(weight.device), 0)
        return made

    def finish(self) -> MaskLosses:
        self.substitution.require_used()
        return MaskLosses(self.groups, self.masks, self.losses / max(self.weight, 1))


@dataclass(frozen=True)
class Bonsai(Importance):
    """How much the loss falls when a unit stays: ridge regression of the loss on ``masks`` random masks.

    Each mask keeps the share ``keep`` of every group of ``kinds``; the unit of the lowest coefficient goes first (Dery
    et al. 2024). ``ridge``: the penalty, relative to the mean square of a mask's row. No gradients are needed.
    """

    masks: int = 64
    keep: float = 0.5
    ridge: float = 1e-2
    kinds: tuple[str, ...] = ("ffn", "kv_head")
    seed: int = 0

    requires = (FindGroups, MaskStatistics)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """Losses under random masks."""
        return (self._statistic(),)

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without data or a loss."""
        found = analyses.get(self._statistic())
        fall = -coefficients(found.masks, found.losses, self.ridge)
        scores: dict[Group, Score] = {}
        start = 0
        for group in found.groups:
            scores[group] = fall[start : start + group.size]
            start += group.size
        said = f"its masks are of the kinds {', '.join(self.kinds)}"
        return Scored("bonsai", scores, {g: said for g in candidates(analyses) if g not in scores})

    def _statistic(self) -> MaskStatistics:
        return MaskStatistics(self.masks, self.keep, self.kinds, self.seed)


def coefficients(masks: UnitMasks, losses: npt.NDArray[np.float64], ridge: float) -> Score:
    """Of the ridge regression of ``losses`` on centred ``masks``, solved over masks, which are fewer than units."""
    x = masks - masks.mean(0)
    kernel = x @ x.T
    penalty = ridge * np.trace(kernel) / len(kernel)
    weights = np.linalg.solve(kernel + penalty * np.eye(len(kernel)), losses - losses.mean())
    return x.T @ weights  # type: ignore[no-any-return]
