"""What rounding may explain of a difference in float64: the model's own rounding, measured and carried over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shear_backends.verify.precision import unit_of

SAFETY = 2.0**10
"""How far two orders of summation may be apart, in roundings as large as the one that was measured."""

STORED = 4.0
"""The same for weights that were computed anew and rounded once: chance may add up otherwise than in the one draw."""


@dataclass(frozen=True)
class Gap:
    """One tensor of both models. ``value``: the largest absolute difference in float64, NaN where there is one.

    ``noise``: that between float64 and the precision of the model, in the reference alone; ``scale``: the largest
    absolute entry of the reference; ``bound``: the difference that rounding explains; ``place``: which tensor.
    """

    place: str
    value: float
    noise: float
    scale: float
    bound: float

    @property
    def sound(self) -> bool:
        """Whether rounding explains it (NaN is never sound)."""
        return self.value <= self.bound

    @property
    def excess(self) -> float:
        """How often the bound the difference is; infinite for NaN."""
        if math.isnan(self.value):
            return math.inf
        return self.value / self.bound if self.bound else math.inf * self.value if self.value else 0.0


def compared(
    place: str, expected: Sequence[Tensor], found: Sequence[Tensor], rounded: Sequence[Tensor],
    nudged: Sequence[Tensor] | None, unit: float,
) -> list[Gap]:  # fmt: skip
    """The gaps between the tensors ``expected`` and ``found``, both in float64.

    ``rounded``: ``expected`` in a precision whose relative rounding is ``unit``; ``nudged``: ``found`` with the
    weights that were computed anew off by their own rounding.
    """
    if len(expected) != len(found):
        return [Gap(f"{place}: {len(found)} tensors for {len(expected)}", math.inf, 0.0, largest(expected), 0.0)]
    gaps = []
    for i, (mine, other) in enumerate(zip(expected, found, strict=True)):
        scale = largest([mine])
        noise = min(difference([mine], [rounded[i]]), scale) if i < len(rounded) else 0.0
        bound = SAFETY * (noise * unit_of(torch.float64) / unit + scale * unit_of(torch.float64))
        if nudged is not None:
            bound += STORED * min(difference([other], [nudged[i]]), scale)
        where = place if len(expected) == 1 else f"{place}, output {i}"
        gaps.append(Gap(where, difference([mine], [other]), noise, scale, bound))
    return gaps


def worst_of(gaps: Iterable[Gap]) -> Gap:
    """The one that rounding explains least."""
    return max(gaps, key=lambda gap: gap.excess)


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest absolute difference, infinite where shapes or counts differ; NaN stays NaN."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    pairs = ((x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.numel())
    # Where both are the same infinity they agree.
    return largest_of([float(torch.where(x == y, 0.0, x - y).abs().max()) for x, y in pairs])


def largest_of(gaps: Sequence[float]) -> float:
    """The largest, NaN when one is NaN: ``max`` would lose it."""
    return float(np.max(gaps, initial=0.0))


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute entry that is finite."""
    entries = (t.double().abs() for t in tensors if t.numel())
    return max((float(torch.where(t.isfinite(), t, 0.0).max()) for t in entries), default=0.0)
