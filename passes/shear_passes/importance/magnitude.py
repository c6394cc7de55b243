"""Magnitude: a norm of everything a unit owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.importance.base import (
    Importance,
    Score,
    Scores,
    candidates,
    over_slices,
    parameters_of,
    weights_of,
)

_AT_ONCE = 1 << 20
"""Entries of a weight that are converted at once."""


@dataclass(frozen=True)
class Magnitude(Importance):
    """``sqrt(sum over the unit's slices of w^2)``, or ``sum of |w|`` for ``p=1`` (Han et al. 2015, a whole unit)."""

    p: Literal[1, 2] = 2

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` when the weights are not at hand."""
        weights = weights_of(analyses, "magnitude")
        groups = candidates(analyses)
        wanted = set(parameters_of(program, groups))
        places = dict.fromkeys((s.parameter, s.dim) for g in groups for s in g.slices if s.parameter in wanted)
        powers = {place: self._powers(weights[place[0]], place[1]) for place in places}
        totals = {group: over_slices(program, group, powers) for group in groups}
        return {group: np.sqrt(total) if self.p == 2 else total for group, total in totals.items()}

    def _powers(self, weight: Tensor, dim: int) -> Score:
        """The sum of ``|w|^p`` at every index of ``dim``."""
        others = [d for d in range(weight.dim()) if d != dim]

        def norm_of(part: Tensor) -> Tensor:
            part = part.float()
            return torch.linalg.vector_norm(part, ord=self.p, dim=others) if others else part.abs()

        # A few units at a time, since all of an embedding in float32 are as large as the model.
        count = max(1, _AT_ONCE * weight.shape[dim] // max(1, weight.numel()))
        norm = torch.cat([norm_of(part) for part in torch.split(weight.detach(), count, dim)])
        return cast(Score, norm.double().pow(self.p).cpu().numpy())
