"""MINI-LLM: gradients from forward passes alone, times weights, times what the weights read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.consumers import FindConsumers
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import (
    Importance,
    Score,
    Scored,
    Scores,
    Statistic,
    candidates,
    over_slices,
    parameters_of,
    sums_along,
    weights_of,
)
from shear_passes.importance.calibration import Calibration, CalibrationStep, Data, Observer, Portion
from shear_passes.importance.statistics import ReadStatistics
from shear_passes.importance.substitution import Substitution


@dataclass(frozen=True, eq=False)
class ForwardGradients:
    """SPSA: ``Ĝ`` = the mean over directions z of ``[L(W+εz) − L(W−εz)] / 2ε · z``, E[Ĝ] = ∇L as ε goes to 0.

    Only the slopes are kept, a number for each direction; z is drawn again from its seed wherever it is needed.
    ``weights``: what counts of the batch that a slope was measured on.
    """

    seed: int
    slopes: list[float] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)

    def gradient(self, name: str, like: Tensor) -> Tensor:
        """The estimate for the parameter ``name`` in fp32, in its shape and on its device."""
        total = torch.zeros_like(like, dtype=torch.float32)
        for number, (slope, weight) in enumerate(zip(self.slopes, self.weights, strict=True)):
            total += weight * slope * direction(self.seed, number, name, like)
        return total / max(sum(self.weights), 1)


def direction(seed: int, number: int, name: str, like: Tensor) -> Tensor:
    """The part of the direction z number ``number`` that belongs to a parameter, the same each time."""
    digest = hashlib.sha256(f"{seed}:{number}:{name}".encode()).digest()
    generator = torch.Generator(device=like.device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(like.shape, generator=generator, device=like.device)


@dataclass(frozen=True)
class ForwardGradientStatistics(Statistic[ForwardGradients]):
    """``directions``: on each batch, new ones for each, at two forward passes a piece; ``epsilon``: the step along z.

    All parameters that groups own slices of move together.
    """

    directions: int = 16
    epsilon: float = 1e-3
    seed: int = 0

    requires = (FindGroups, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> Observer:
        """Goes two ways along each direction after every batch."""
        if self.directions < 1 or not self.epsilon > 0:
            raise PlanError("forward gradients need directions from 1 up and an epsilon above 0")
        names = parameters_of(program, candidates(analyses))
        return _ForwardObserver(self, Substitution(calibration.model, program, names))


class _ForwardObserver(Observer):
    needs_loss = True

    def __init__(self, asked: ForwardGradientStatistics, substitution: Substitution) -> None:
        self.asked, self.substitution = asked, substitution
        self.found = ForwardGradients(asked.seed)

    def portion(self, calibration: Calibration) -> Portion:
        """Whole batches, for each portion has directions of its own."""
        return "whole"

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        yield

    def after(self, step: CalibrationStep) -> None:
        for _ in range(self.asked.directions):
            ahead, behind = (self._moved(step, sign * self.asked.epsilon) for sign in (1, -1))
            self.found.slopes.append((ahead - behind) / (2 * self.asked.epsilon))
            self.found.weights.append(step.weight)

    def _moved(self, step: CalibrationStep, by: float) -> float:
        number = len(self.found.slopes)

        def change(name: str, weight: Tensor) -> Tensor:
            return weight + (by * direction(self.asked.seed, number, name, weight)).to(weight.dtype)

        with self.substitution.using(change):
            return step.again()

    def finish(self) -> ForwardGradients:
        self.substitution.require_used()
        return self.found


@dataclass(frozen=True)
class MiniLlm(Importance):
    """``Σ |W_ij · Ĝ_ij| · ‖X_j‖₂`` over the unit's slices, Ĝ by SPSA, X what the weight reads (Cheng et al. 2024).

    The paper does not give the exact product: this is our reading. Weights that read nothing, such as biases, are
    left out. Forward passes only: two for every direction and batch; ``epsilon`` is the step along a direction.
    """

    directions: int = 16
    epsilon: float = 1e-3
    seed: int = 0

    requires = (FindGroups, FindConsumers, ReadStatistics, ForwardGradientStatistics)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """What weights read, and the slopes along random directions."""
        return ReadStatistics(), self._forward()

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without weights, data or a loss."""
        weights = weights_of(analyses, "mini-llm")
        seen, forward = analyses.get(ReadStatistics()), analyses.get(self._forward())
        groups = candidates(analyses)
        dims: dict[str, set[int]] = {name: set() for name in parameters_of(program, groups)}
        for piece in (s for g in groups for s in g.slices if s.parameter in dims):
            dims[piece.parameter].add(piece.dim)
        sums: dict[tuple[str, int], Score] = {}
        for consumer in analyses.get(FindConsumers()):
            name = consumer.parameter
            if name not in dims or consumer not in seen:
                continue
            weight = weights[name].detach().float()
            norms = seen[consumer].squares.sqrt().to(weight)
            element = (weight * forward.gradient(name, weight)).abs() * consumer.spread(norms, weight)
            for dim in dims[name]:
                sums[name, dim] = sums.get((name, dim), 0.0) + sums_along(element, dim)
        return Scored("mini-llm", *_scored(program, groups, sums))

    def _forward(self) -> ForwardGradientStatistics:
        return ForwardGradientStatistics(self.directions, self.epsilon, self.seed)


def _scored(
    program: Program, groups: list[Group], sums: dict[tuple[str, int], Score]
) -> tuple[dict[Group, Score], dict[Group, str]]:
    scores, reasons = {}, {}
    for group in groups:
        if any((s.parameter, s.dim) in sums for s in group.slices):
            scores[group] = over_slices(program, group, sums)
        else:
            reasons[group] = "nothing was seen that its weights read"
    return scores, reasons
