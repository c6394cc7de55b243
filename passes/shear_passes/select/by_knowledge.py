"""Selection by the knowledge distribution: each group loses what costs least by its measured loss deviations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shear_ir.errors import PlanError
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Group
from shear_passes.importance import Scores
from shear_passes.select.by_ratio import SelectByRatio, Shares

Curve = tuple[tuple[float, float], ...]
"""How a loss grows: pairs of the share of a group's units that is gone, and nats per token."""


@dataclass(frozen=True)
class SelectByKnowledge(SelectByRatio):
    """Minimises the sum of the groups' loss deviations for what goes; ``SelectByRatio`` has the options.

    ``curves``: group name to the deviation at some shares, as the knowledge distribution measures it. With the lower
    convex hull of each curve (from 0 at 0) the minimum is found exactly by taking hull segments in the order of their
    nats per parameter. Beyond its last measured share a group is cut only when all others are cut that far.
    """

    curves: tuple[tuple[str, Curve], ...] = ()

    def wanted(self, groups: Sequence[Group], scores: Scores, program: Program) -> Shares:
        """The share is one of the parameters of all units. Raises ``PlanError`` for a group without a curve."""
        known = dict(self.curves)
        missing = [g.name for g in groups if g.name not in known]
        if missing:
            raise PlanError(f"the knowledge distribution says nothing of {missing[0]}: measure it for these kinds")
        segments = [(i, *s) for i, g in enumerate(groups) for s in _segments(g, known[g.name])]
        table = np.array(segments, dtype=np.float64).reshape(-1, 4)
        table = table[np.lexsort((table[:, 3], table[:, 1]))]
        owner, widths = table[:, 0].astype(np.int64), table[:, 2]
        sizes = np.array([g.parameters_per_unit * g.size for g in groups], dtype=np.float64)[owner] * widths
        before = np.cumsum(sizes) - sizes

        def wanted(share: float) -> Mapping[Group, float]:
            taken = np.clip((share * sizes.sum() - before) / sizes, 0.0, 1.0) * widths
            gone = np.bincount(owner, weights=taken, minlength=len(groups))
            return {g: float((1.0 - gone[i]) * g.size) for i, g in enumerate(groups)}

        return wanted


def _segments(group: Group, curve: Curve) -> Iterator[tuple[float, float, float]]:
    """Of the hull: 1 beyond what was measured else 0; width as a share of the units; nats per parameter."""
    hull = _hull(sorted({0.0: 0.0, **{share: _finite(loss) for share, loss in curve if 0.0 < share <= 1.0}}.items()))
    size = group.parameters_per_unit * group.size
    slope = 0.0
    for (x, y), (nx, ny) in pairwise(hull):
        slope = (ny - y) / ((nx - x) * size)
        yield 0.0, nx - x, slope
    if hull[-1][0] < 1.0:
        yield 1.0, 1.0 - hull[-1][0], slope


def _finite(loss: float) -> float:
    return max(0.0, loss) if math.isfinite(loss) else 1e9


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in the order of x (Andrew 1979)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (ax, ay), (bx, by) = hull[-2:]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            hull.pop()
        hull.append((x, y))
    return hull
