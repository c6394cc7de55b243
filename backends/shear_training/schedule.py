"""When units go: warm-up, periods, and how many of each kind become redundant in which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shear_ir.errors import PlanError


@dataclass(frozen=True)
class Periods:
    """Progressive pruning in ``count`` periods of ``steps`` optimizer steps each, after ``warmup`` steps.

    In each step of its period a redundant unit loses an equal part of its norm, and is zero at the last. A unit is
    set to zero before that when what is left of it points away from what it was: ``<new, old> < eps |old|^2`` with
    ``eps`` in [0, 1); 0 only when it turns around, 0.9 some nine steps before the end.
    """

    warmup: int = 20
    count: int = 5
    steps: int = 20
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise PlanError(f"warm-up is a number of steps from 0 up, not {self.warmup}")
        if self.count < 1 or self.steps < 1:
            raise PlanError(f"there is at least one period of one step, not {self.count} of {self.steps}")
        if not 0.0 <= self.eps < 1.0:
            raise PlanError(f"eps is a share from 0 to less than 1, not {self.eps}")

    @property
    def total(self) -> int:
        """Optimizer steps until the last unit is zero."""
        return self.warmup + self.count * self.steps

    def period(self, step: int) -> int:
        """The period that step ``step`` (from 0) is in: -1 in the warm-up, ``count`` after the last."""
        return -1 if step < self.warmup else min(self.count, (step - self.warmup) // self.steps)

    def left(self, step: int) -> int:
        """Steps of its period that are left, this one included; ``steps`` at the period's first, 1 at its last."""
        return self.steps - (step - self.warmup) % self.steps

    def ends(self, step: int) -> bool:
        """Whether step ``step`` is the last one of a period or of the warm-up, so that the next units are chosen."""
        return step + 1 == self.warmup or (0 <= self.period(step) < self.count and self.left(step) == 1)

    def quotas(self, totals: Mapping[str, int]) -> list[dict[str, int]]:
        """How many units of each kind become redundant in each period.

        A period takes ``K // count`` units of all kinds together, the last one also the remainder; each kind goes at
        the pace of its own total.
        """
        kinds = [kind for kind, total in totals.items() for _ in range(total)]
        # Kinds interleaved so that each prefix holds them in proportion (Webster's method).
        places = np.concatenate([(np.arange(t) + 0.5) / t for t in totals.values() if t] or [np.zeros(0)])
        queue = [kinds[i] for i in np.argsort(places, kind="stable")]
        each = len(queue) // self.count
        ends = [*(each * period for period in range(1, self.count)), len(queue)]
        starts = [0, *ends[:-1]]
        return [
            {kind: queue[start:end].count(kind) for kind in totals} for start, end in zip(starts, ends, strict=True)
        ]
