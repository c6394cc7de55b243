"""Order: the first units stay, and of blocks the last one too. For models of which only the shapes are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BLOCK_KINDS
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import Importance, Score, Scores


@dataclass(frozen=True)
class Order(Importance):
    """Unit i has score -i; the last block, which makes what the head reads, has that of the first.

    Without data it is a fair guess that the deeper blocks matter least, but for the very last (Gromov et al. 2024).
    """

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Needs no weights."""
        groups = [g for g in analyses.get(FindGroups()) if g.prunable or g.rescalable]
        return {g: _last_up(g, -np.arange(g.size, dtype=np.float64)) for g in groups}


def _last_up(group: Group, scores: Score) -> Score:
    if group.kind in BLOCK_KINDS:
        scores[-1] = 0.0
    return scores
