"""Uniform selection: one sparsity per kind, so that equal layers stay equal and one config describes the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shear_ir.program import Program
from shear_passes.analysis.find_groups import Group
from shear_passes.importance import Scores
from shear_passes.select.by_ratio import SelectByRatio, Shares


@dataclass(frozen=True)
class SelectUniform(SelectByRatio):
    """Every group loses the same share of its units; ``SelectByRatio`` has the options."""

    def wanted(self, groups: Sequence[Group], scores: Scores, program: Program) -> Shares:
        """Scores do not matter: they say which units go, not how many."""
        return lambda share: {g: (1.0 - share) * g.size for g in groups}

    def alike(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Those of one kind and size, whose number stands in a config once."""
        classes: dict[tuple[str, int], list[Group]] = {}
        for group in groups:
            classes.setdefault((group.kind, group.size), []).append(group)
        return list(classes.values())
