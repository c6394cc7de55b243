"""Importance criteria: one per file, one interface: a score for every unit of every group."""

from __future__ import annotations

from shear_ir.errors import PlanError
from shear_passes.importance.base import Importance, Scores
from shear_passes.importance.magnitude import Magnitude
from shear_passes.importance.order import Order
from shear_passes.importance.random import Random

CRITERIA: dict[str, type[Importance]] = {"magnitude": Magnitude, "random": Random, "order": Order}


def criterion(name: str, seed: int = 0) -> Importance:
    """The criterion of this name; raises ``PlanError`` listing the names there are."""
    if name not in CRITERIA:
        raise PlanError(f"there is no importance criterion '{name}'; there are {', '.join(sorted(CRITERIA))}")
    if seed < 0:
        raise PlanError(f"a seed is a number from 0 up, not {seed}")
    return Random(seed) if name == "random" else CRITERIA[name]()


__all__ = ["CRITERIA", "Importance", "Magnitude", "Order", "Random", "Scores", "criterion"]
