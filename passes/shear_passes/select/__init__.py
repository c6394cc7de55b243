"""Selection: scores and a target become a Plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shear_ir.errors import PlanError
from shear_passes.rewrite.cuts import Selection, build_plan
from shear_passes.select.blocks import SelectBlocks
from shear_passes.select.by_knowledge import SelectByKnowledge
from shear_passes.select.by_ratio import SelectByRatio
from shear_passes.select.competing import SelectGlobal, SelectIsomorphic
from shear_passes.select.uniform import SelectUniform

__all__ = [
    "ALLOCATIONS", "SelectBlocks", "SelectByKnowledge", "SelectByRatio", "SelectGlobal", "SelectIsomorphic",
    "SelectUniform", "Selection", "build_plan", "selection",
]  # fmt: skip

ALLOCATIONS: Mapping[str, type[SelectByRatio]] = {
    cls.name().removeprefix("select-"): cls
    for cls in (SelectUniform, SelectGlobal, SelectIsomorphic, SelectByKnowledge)
}


def selection(
    allocation: str, knowledge: Mapping[str, Mapping[float, float]] | None = None, **options: Any
) -> SelectByRatio:
    """The selection of that allocation; raises ``PlanError`` for an unknown one, and where it needs knowledge."""
    cls = ALLOCATIONS.get(allocation)
    if cls is None:
        raise PlanError(f"there is no allocation '{allocation}'; there are {', '.join(ALLOCATIONS)}")
    if cls is not SelectByKnowledge:
        return cls(**options)
    if knowledge is None:
        raise PlanError("the allocation by-knowledge needs what the knowledge distribution measured")
    curves = tuple((name, tuple(sorted(curve.items()))) for name, curve in knowledge.items())
    return SelectByKnowledge(**options, curves=curves)
