"""The interface of an importance criterion, and what criteria share: sums over units, statistics from data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.calibration import Calibration, Data, Observer

Score = npt.NDArray[np.float64]
Scores = Mapping[Group, Score]
"""Group to the importance of its units, shape ``(size,)``; the least important unit goes first."""

Reduce = Literal["sum", "mean", "max", "l2"]
"""How the features of a unit become one number: a head has head_dim of them for each of its query heads."""

T = TypeVar("T")


class Importance(Analysis[Scores]):
    """Scores every unit of every group that could lose units, seeing every slice the unit owns."""

    requires: ClassVar[tuple[type[Analysis[Any]], ...]] = (FindGroups,)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """What the criterion reads from data, so that one pass can serve several criteria."""
        return ()

    @property
    def blind(self) -> bool:
        """Whether it looks at no data, which costs a language model much."""
        return not self.statistics()


class Statistic(Analysis[T], Generic[T]):
    """What one pass over calibration data leaves behind; its size depends on the model alone."""

    requires: ClassVar[tuple[type[Analysis[Any]], ...]] = (Data,)

    def run(self, program: Program, analyses: AnalysisManager) -> T:
        """One pass for this statistic alone; raises ``PlanError`` without data."""
        calibration = analyses.get(Data())
        observer = self.observer(program, analyses, calibration)
        calibration.run([observer])
        return observer.finish()  # type: ignore[no-any-return]

    @abstractmethod
    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> Observer:
        """What watches; it is asked for the result when the pass is over."""


def collect(statistics: Iterable[Statistic[Any]], analyses: AnalysisManager) -> None:
    """Measure all of ``statistics`` in one pass over the data, for every criterion that asks for them later."""
    wanted = tuple(dict.fromkeys(statistics))
    if not wanted:
        return
    calibration = analyses.get(Data())
    made = [
        analyses.running(s, lambda s=s: s.observer(analyses.program, analyses, calibration))  # type: ignore[misc]
        for s in wanted
    ]
    calibration.run(made)
    for statistic, observer in zip(wanted, made, strict=True):
        analyses.put(statistic, observer.finish())


class Scored(Mapping[Group, Score]):
    """Scores by group; asking for a group that could not be scored raises ``PlanError`` with the reason."""

    def __init__(self, criterion: str, scores: Mapping[Group, Score], reasons: Mapping[Group, str]) -> None:
        self.criterion, self.scores, self.reasons = criterion, dict(scores), dict(reasons)

    def __getitem__(self, group: Group) -> Score:
        if group in self.reasons:
            raise PlanError(
                f"{self.criterion} cannot score {group.name} ({group.kind}): {self.reasons[group]}; leave the kind "
                "out, or choose a criterion of weights and gradients: taylor, magnitude"
            )
        return self.scores[group]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


class Checked(Mapping[Group, Score]):
    """The scores that any criterion gave; a group is looked at when it is asked for.

    Raises ``PlanError`` where a criterion gave no number for each unit of it.
    """

    def __init__(self, criterion: str, scores: Any) -> None:
        if not isinstance(scores, Mapping):
            raise PlanError(f"{criterion} gives a {type(scores).__name__}, not the scores of each group")
        self.criterion, self.scores = criterion, scores

    def __getitem__(self, group: Group) -> Score:
        if group not in self.scores:
            raise PlanError(f"{self.criterion} gives no scores for {group.name} ({group.kind})")
        return checked(self.criterion, group, self.scores[group])

    def __iter__(self) -> Iterator[Group]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def checked(criterion: str, group: Group, made: Any) -> Score:
    """``made`` as an array of shape ``(group.size,)``; raises ``PlanError`` where it is something else, or NaN."""
    values = made.detach().double().cpu().numpy() if isinstance(made, Tensor) else made
    try:
        found = np.asarray(values).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError) as failure:
        raise PlanError(f"{criterion} returns a {type(made).__name__} for {group.name}, not numbers") from failure
    if found.shape != (group.size,):
        raise PlanError(f"{criterion} returns shape {found.shape} for {group.name}, which has {group.size} units")
    if np.isnan(found).any():
        raise PlanError(f"{criterion} returns NaN for {group.name}")
    return found


def candidates(analyses: AnalysisManager) -> list[Group]:
    """The groups that could lose units, in graph order."""
    return [g for g in analyses.get(FindGroups()) if g.prunable or g.rescalable]


def weights_of(analyses: AnalysisManager, criterion: str) -> Mapping[str, Tensor]:
    """Tensors by name; raises ``PlanError`` when they are not at hand."""
    weights = analyses.weights
    if weights is None or any(w.is_meta for w in weights.values()):
        raise PlanError(f"{criterion} needs weights, and this model has only its shapes: use importance='order'")
    return weights


def parameters_of(program: Program, groups: Iterable[Group]) -> tuple[str, ...]:
    """Names of the parameters, not buffers, in which ``groups`` own slices."""
    names = dict.fromkeys(s.parameter for g in groups for s in g.slices)
    return tuple(n for n in names if program.params[n].kind == "parameter")


def over_slices(program: Program, group: Group, sums_along: Mapping[tuple[str, int], Score]) -> Score:
    """The sum over the unit's slices, given each parameter's values along each dim; shape ``(size,)``.

    An index that two units share counts for both.
    """
    total = np.zeros(group.size)
    for piece in group.slices:
        if program.params[piece.parameter].kind == "parameter" and (piece.parameter, piece.dim) in sums_along:
            total += reduced(piece.index_map, sums_along[piece.parameter, piece.dim], group.size, "sum")
    return total


def sums_along(values: Tensor, dim: int) -> Score:
    """The sum of ``values`` over all dims but one, in fp64; shape ``(size of the dim,)``."""
    others = [d for d in range(values.dim()) if d != dim]
    summed = values.sum(dim=others, dtype=torch.float64) if others else values.double()
    return cast(Score, summed.cpu().numpy())


def reduced(owners: Iterable[npt.NDArray[np.int64]], values: Score, size: int, how: Reduce) -> Score:
    """One number per unit from those of its features; 0 for a unit without any."""
    total, count = np.zeros(size), np.zeros(size)
    for owner in owners:
        mine = owner >= 0
        count += np.bincount(owner[mine], minlength=size)
        if how == "max":
            np.maximum.at(total, owner[mine], values[mine])
        else:
            each = np.square(values[mine]) if how == "l2" else values[mine]
            total += np.bincount(owner[mine], weights=each, minlength=size)
    if how == "mean":
        return total / np.maximum(count, 1)
    return np.sqrt(total) if how == "l2" else total
