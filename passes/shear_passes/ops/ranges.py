"""Between which bounds numbers lie, and what arithmetic makes of the bounds: so a divisor is seen not to be zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

KnownRanges = Mapping[fx.Node, "Range"]


@dataclass(frozen=True)
class Range:
    """All numbers between two bounds, which are among them; ``zero``: whether zero is, where it lies between them."""

    low: float
    high: float
    zero: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero", self.zero and self.low <= 0 <= self.high)

    @property
    def single(self) -> bool:
        """Whether only one number is possible."""
        return self.low == self.high

    @property
    def positive(self) -> bool:
        """Whether every number is above zero."""
        return self.low >= 0 and not self.zero

    def __or__(self, other: Range) -> Range:
        """What lies in one of two ranges."""
        return Range(min(self.low, other.low), max(self.high, other.high), self.zero or other.zero)

    def __neg__(self) -> Range:
        return Range(-self.high, -self.low, self.zero)

    def __add__(self, other: Range) -> Range:
        one_side = (self.low >= 0 and other.low >= 0) or (self.high <= 0 and other.high <= 0)
        zero = self.zero and other.zero if one_side else True
        return ordered(self.low + other.low, self.high + other.high, zero)

    def __mul__(self, other: Range) -> Range:
        ends = [_times(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return ordered(min(ends), max(ends), self.zero or other.zero)

    def inverse(self) -> Range:
        """One over it, which is anything where it may be zero."""
        if self.zero or self.low < 0 < self.high:
            return ANY if self.zero else Range(-math.inf, math.inf, zero=False)
        if self.low < 0:
            return -(-self).inverse()
        return Range(1 / self.high, 1 / self.low if self.low else math.inf, zero=False)

    def size(self) -> Range:
        """Its absolute value."""
        low = 0.0 if self.low <= 0 <= self.high else min(abs(self.low), abs(self.high))
        return Range(low, max(abs(self.low), abs(self.high)), self.zero)

    def many(self) -> Range:
        """The sum of one number or more."""
        return ordered(
            self.low if self.low >= 0 else -math.inf,
            self.high if self.high <= 0 else math.inf,
            self.zero or self.low < 0 < self.high,
        )

    def held(self, dtype: torch.dtype) -> Range:
        """What a type makes of it: small numbers may be zero in half precision."""
        if dtype is torch.bool:
            return Range(bool(self.low), bool(self.high), self.zero)  # still numbers, which a mask can be made of
        if not dtype.is_floating_point or self == ANY:
            return self
        low, high = (float(torch.tensor(end, dtype=torch.float64).to(dtype)) for end in (self.low, self.high))
        lost = (low == 0 != self.low) or (high == 0 != self.high)
        return ordered(low, high, self.zero or lost)


ANY = Range(-math.inf, math.inf)
ZERO = Range(0, 0)
NOT_NEGATIVE = Range(0, math.inf)
POSITIVE = Range(0, math.inf, zero=False)
SHARE = Range(0, 1)


def ordered(low: float, high: float, zero: bool = True) -> Range:
    """The range between two bounds; anything, where one of them is no number."""
    return ANY if math.isnan(low) or math.isnan(high) else Range(low, high, zero)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def value(node: fx.Node, numbers: Mapping[fx.Node, float]) -> float:
    """The entry that an elementwise call makes of these; no number where it makes none of them."""
    entries = {operand: _entry(number) for operand, number in numbers.items()}
    try:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), entries.__getitem__)
        return float(node.target(*args, **kwargs))  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return math.nan


def _entry(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.bool if isinstance(number, bool) else torch.float64)


def largest(a: Range, b: Range) -> Range:
    """The range of the larger of two numbers."""
    zero = not (a.positive or b.positive) and (a.zero or b.zero)
    return ordered(max(a.low, b.low), max(a.high, b.high), zero)
