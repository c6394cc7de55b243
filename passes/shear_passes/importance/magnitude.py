"""Magnitude: the L2 norm of everything a unit owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import Importance, Score, Scores


@dataclass(frozen=True)
class Magnitude(Importance):
    """``score(unit) = sqrt(sum over its slices of w^2)`` (Han et al. 2015, taken over a whole unit)."""

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` when the weights are not at hand."""
        weights = analyses.weights
        if weights is None or any(w.is_meta for w in weights.values()):
            raise PlanError("magnitude needs weights, and this model has only its shapes: use importance='order'")
        squares = _Squares(weights)
        groups = [g for g in analyses.get(FindGroups()) if g.prunable or g.rescalable]
        return {group: np.sqrt(_total(program, group, squares)) for group in groups}


class _Squares:
    """Sums of squares along one dim of a tensor, each computed once; shape ``(size of the dim,)``."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.known: dict[tuple[str, int], Score] = {}

    def along(self, name: str, dim: int) -> Score:
        """The sum of squares of every index of ``dim``."""
        if (name, dim) not in self.known:
            weight = self.weights[name].detach()
            others = [d for d in range(weight.dim()) if d != dim]
            weight = weight.float()
            norm = torch.linalg.vector_norm(weight, dim=others) if others else weight.abs()
            self.known[name, dim] = norm.double().square().cpu().numpy()
        return self.known[name, dim]


def _total(program: Program, group: Group, squares: _Squares) -> Score:
    total = np.zeros(group.size)
    for piece in group.slices:
        if program.params[piece.parameter].kind != "parameter":
            continue
        along = squares.along(piece.parameter, piece.dim)
        for owner in piece.index_map:
            mine = owner >= 0
            total += np.bincount(owner[mine], weights=along[mine], minlength=group.size)
    return total
