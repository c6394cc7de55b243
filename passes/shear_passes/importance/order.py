"""Order: the first units stay. For planning a model of which only the shapes are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance.base import Importance, Scores


@dataclass(frozen=True)
class Order(Importance):
    """Unit i has score -i."""

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Needs no weights."""
        groups = [g for g in analyses.get(FindGroups()) if g.prunable or g.rescalable]
        return {g: -np.arange(g.size, dtype=np.float64) for g in groups}
