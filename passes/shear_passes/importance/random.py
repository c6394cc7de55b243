"""Random scores: the baseline every criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance.base import Importance, Scores


@dataclass(frozen=True)
class Random(Importance):
    """Independent uniform scores from ``seed``."""

    seed: int = 0

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Groups are drawn in graph order, so that a seed means the same scores every time."""
        draw = np.random.default_rng(self.seed)
        return {g: draw.random(g.size) for g in analyses.get(FindGroups()) if g.prunable or g.rescalable}
