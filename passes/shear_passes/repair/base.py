"""What repairs share: consumers that lose features, and the statistics of what they read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shear_ir.axes import Axis, Mask, atoms, mask
from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager, Rewrite
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.consumers import Consumer, Consumers, FindConsumers
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.analysis.infer_axes import InferAxes
from shear_passes.analysis.vanish import FindZeros
from shear_passes.importance.statistics import CalibrationStatistics, Moments, ReadStatistics
from shear_passes.rewrite.cuts import Selection, checked


@dataclass(frozen=True, eq=False)
class LostFeatures:
    """A consumer that loses features. ``stays``: which features are kept, shape ``(features,)``; ``bias``: the name of
    the parameter that is added to its product, empty for none."""

    consumer: Consumer
    stays: Tensor
    moments: Moments
    bias: str


class Repair(Rewrite):
    """Changes weights so that the latest selection costs less; the program and its shapes stay as they are.

    Put it between a selection and ``Shear``. Only what the cut leaves is changed, so without a cut nothing is.
    """

    preserves = (InferAxes, FindZeros, FindGroups, FindConsumers, Selection)
    gram: ClassVar[bool] = False

    def run(self, program: Program, analyses: AnalysisManager) -> Program:
        """The program itself; ``carry`` has the new weights."""
        return program

    def carry(self, weights: Mapping[str, Tensor] | None, analyses: AnalysisManager) -> Mapping[str, Tensor] | None:
        """The weights, repaired; raises ``PlanError`` without a selection before it."""
        plan = analyses.latest(Selection)  # type: ignore[type-abstract]  # any selection
        if plan is None:
            raise PlanError(f"{self.name()} repairs what a selection removes: put one before it")
        if weights is None:
            return None
        groups, consumers = analyses.get(FindGroups()), analyses.get(FindConsumers())
        return {**weights, **self.repaired(weights, groups, plan, consumers, analyses.get(self.statistics()))}

    def statistics(self, only: tuple[str, ...] = ()) -> ReadStatistics:
        """What it reads from data; ``only``: of consumers of these parameters, where it is known which matter."""
        return ReadStatistics(self.gram, only)

    @abstractmethod
    def repaired(
        self, weights: Mapping[str, Tensor], groups: Groups, plan: Plan, consumers: Consumers,
        statistics: CalibrationStatistics,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The tensors that change, of the shapes they have."""


def losses(
    groups: Groups, plan: Plan, consumers: Consumers, statistics: CalibrationStatistics
) -> Iterator[LostFeatures]:
    """The consumers that lose features and keep some, in graph order.

    Convolutions in groups are left out, since an output reads only its own channels; so are stacked experts, whose
    inputs are other tokens for each of them.
    """
    masks = checked(groups, plan).masks
    biases = _biases(groups)
    for consumer in consumers:
        if consumer.groups > 1 or _is_stacked(groups, consumer) or not _is_cut(consumer, masks):
            continue
        stays = torch.from_numpy(mask(consumer.features, masks))
        if consumer in statistics and bool(stays.any()):
            yield LostFeatures(consumer, stays, statistics[consumer], biases.get(consumer.parameter, ""))


def losing(groups: Groups, plan: Plan, consumers: Consumers, limit: int) -> Iterator[tuple[str, ...]]:
    """The parameters of the consumers that lose features, in parts whose Gram matrices take about ``limit`` bytes."""
    masks = checked(groups, plan).masks
    part: list[str] = []
    read: dict[Any, int] = {}
    for consumer in consumers:
        if _is_cut(consumer, masks):
            # Consumers of the same values share one matrix, in float64.
            same = (consumer.sources, consumer.feature) if consumer.modules is not None else consumer.key
            needs = 0 if same in read else 8 * consumer.features.size**2
            if part and needs and sum(read.values()) + needs > limit:
                yield tuple(part)
                part, read = [], {}
            part.append(consumer.parameter)
            read[same] = read.get(same, 8 * consumer.features.size**2)
    if part:
        yield tuple(part)


def _is_cut(consumer: Consumer, masks: Mapping[Axis, Mask]) -> bool:
    return any(atom in masks for atom in consumer.axes)


def _is_stacked(groups: Groups, consumer: Consumer) -> bool:
    dims = groups.axes.of_param[consumer.parameter]
    owned = (groups.by_axis.get(a) for d, dim in enumerate(dims) if d != consumer.dim for a in atoms(dim))
    return any(g is not None and g.kind == "expert" for g in owned)


def _biases(groups: Groups) -> dict[str, str]:
    """Weight to the one parameter that is added to its product wherever it is used."""
    program = groups.program
    found: dict[str, set[str]] = {}
    for made in groups.axes.contractions:
        added = {p.name for n in made.added if (p := program.param(n)) is not None}
        for operand in made.operands:
            if (weight := program.param(operand.node)) is not None:
                found.setdefault(weight.name, set()).update(added or {""})
    return {name: next(iter(biases)) for name, biases in found.items() if len(biases) == 1}
