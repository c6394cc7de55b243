"""Taylor criteria: what the loss would change by if a unit were zero, to first and second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance.base import (
    Importance,
    Score,
    Scores,
    Statistic,
    candidates,
    over_slices,
    parameters_of,
    sums_along,
    weights_of,
)
from shear_passes.importance.gradients import Gradients, GradientStatistics


@dataclass(frozen=True)
class Taylor(Importance):
    """Of the expansion ``L(0) - L(W) = -∇·W + ½ Wᵀ H W``, with the Fisher diagonal F for H (Ma et al. 2023).

    ``order``: 1 for ``Σ |∇ ⊙ W|``, 2 for ``Σ |½ W² F|``, mixed for ``Σ |∇ W − ½ W² F|``, over the unit's slices;
    F is the mean over rows of ∇², each weighed by its tokens that count. ``vector``: take the absolute value of
    each unit's sum instead of each element's.
    """

    order: Literal[1, 2, "mixed"] = 1
    vector: bool = False

    requires = (FindGroups, GradientStatistics)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """The gradient, and its square where the order asks for it."""
        return (self._statistic(),)

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without weights, data or a loss."""
        if self.order not in (1, 2, "mixed"):
            raise PlanError(f"taylor has the orders 1, 2 and mixed, not {self.order}")
        weights = weights_of(analyses, "taylor")
        gradients = analyses.get(self._statistic())
        groups = candidates(analyses)
        dims: dict[str, set[int]] = {name: set() for name in parameters_of(program, groups)}
        for piece in (s for g in groups for s in g.slices if s.parameter in dims):
            dims[piece.parameter].add(piece.dim)
        sums: dict[tuple[str, int], Score] = {}
        for name, places in dims.items():
            element = self._element(name, weights[name].detach().float(), gradients)
            sums |= {(name, dim): sums_along(element if self.vector else element.abs(), dim) for dim in places}
        return {g: np.abs(over_slices(program, g, sums)) for g in groups}

    def _statistic(self) -> GradientStatistics:
        return GradientStatistics(squares=self.order != 1)

    def _element(self, name: str, weight: Tensor, gradients: Gradients) -> Tensor:
        """The term of every element, in the shape of the parameter."""
        grad = gradients.mean[name].to(weight.device)
        if self.order == 1:
            return grad * weight
        curved = 0.5 * weight.square() * gradients.squares[name].to(weight.device)
        return curved if self.order == 2 else grad * weight - curved
