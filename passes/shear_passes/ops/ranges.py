"""Between which bounds an operator's result lies, given those of its operands: so a divisor is seen not to be zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Known = Mapping[fx.Node, "Range"]


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
        return _ordered(self.low + other.low, self.high + other.high, zero)

    def __mul__(self, other: Range) -> Range:
        ends = [_times(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return _ordered(min(ends), max(ends), self.zero or other.zero)

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
        return _ordered(
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
        return _ordered(low, high, self.zero or lost)


ANY = Range(-math.inf, math.inf)
ZERO = Range(0, 0)
NOT_NEGATIVE = Range(0, math.inf)
POSITIVE = Range(0, math.inf, zero=False)
SHARE = Range(0, 1)


def _ordered(low: float, high: float, zero: bool = True) -> Range:
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


_GROWING = {
    "relu", "tanh", "sigmoid", "sqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "softplus", "erf",
    "atan", "asinh", "sinh", "clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "relu6", "hardsigmoid", "floor",
    "ceil", "round", "trunc", "softsign", "erfinv", "asin", "atanh", "acosh", "logit",
}  # fmt: skip
"""Functions of their first operand that never fall, with numbers for the rest."""

_NEVER_ZERO = {"sigmoid", "exp", "exp2", "softplus"}
_ZERO_AT_ZERO = {
    "tanh",
    "sqrt",
    "expm1",
    "erf",
    "atan",
    "asinh",
    "sinh",
    "log1p",
    "softsign",
    "erfinv",
    "asin",
    "atanh",
}
"""Of these, the ones that are zero at zero and nowhere else."""


def _growing(name: str, node: fx.Node, x: Range) -> Range:
    first = node.args[0]
    if not isinstance(first, fx.Node) or len(node.all_input_nodes) != 1:
        return ANY
    low, high = (value(node, {first: end}) for end in (x.low, x.high))
    return _ordered(low, high, x.zero if name in _ZERO_AT_ZERO else name not in _NEVER_ZERO)


def _power(base: Range, exponent: Range) -> Range:
    if not exponent.single:
        return POSITIVE if base.positive else ANY
    power = exponent.low
    if power < 0:
        return _power(base, -exponent).inverse()
    if power == 0:
        return Range(1, 1)
    if base.low < 0 and power % 2 == 0:
        base = base.size()
    return ANY if base.low < 0 else Range(_raised(base.low, power), _raised(base.high, power), base.zero)


def _raised(base: float, power: float) -> float:
    try:
        return float(base**power)
    except OverflowError:
        return math.inf


_FUNCTIONS: dict[str, Callable[..., Range]] = {
    **dict.fromkeys(("mul", "multiply"), lambda a, b: a * b),
    **dict.fromkeys(("div", "divide", "true_divide"), lambda a, b: a * b.inverse()),
    **dict.fromkeys(("pow", "float_power"), _power),
    **dict.fromkeys(("neg", "negative"), lambda x: -x),
    **dict.fromkeys(("abs", "absolute"), lambda x: x.size()),
    **dict.fromkeys(("sin", "cos"), lambda x: Range(-1, 1)),
    **dict.fromkeys(("maximum", "fmax"), lambda a, b: _ordered(max(a.low, b.low), max(a.high, b.high), not (
        a.positive or b.positive) and (a.zero or b.zero))),
    **dict.fromkeys(("minimum", "fmin"), lambda a, b: -_FUNCTIONS["maximum"](-a, -b)),
    "square": lambda x: _power(x, Range(2, 2)),
    "reciprocal": lambda x: x.inverse(),
    "rsqrt": lambda x: _power(x, Range(-0.5, -0.5)),
    "cosh": lambda x: Range(1, math.inf),
    "where": lambda _, a, b: a | b,
    "masked_fill": lambda x, _, filled: x | filled,
}  # fmt: skip

_SUMS: dict[str, Callable[[Range, Range], Range]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a + -b,
    "subtract": lambda a, b: a + -b,
    "rsub": lambda a, b: b + -a,
}


NAMES = _GROWING | _FUNCTIONS.keys() | _SUMS.keys()
"""Operators whose results have bounds."""


def elementwise(name: str, node: fx.Node, known: Known) -> Range:
    """The range of a pointwise call whose operator has this name; anything, where that is not known."""
    if all(known[operand].single for operand in node.all_input_nodes):
        made = value(node, {operand: known[operand].low for operand in node.all_input_nodes})
        if not math.isnan(made):
            return Range(made, made)
    sides = [_side(a, known) for a in node.args]
    if name in _GROWING:
        return _growing(name, node, sides[0])
    if name in _SUMS and len(sides) == 2:
        alpha = _side(node.kwargs.get("alpha", 1), known)
        scaled = (sides[0] * alpha, sides[1]) if name == "rsub" else (sides[0], sides[1] * alpha)
        return _SUMS[name](*scaled)
    return ANY if node.kwargs or name not in _FUNCTIONS else _FUNCTIONS[name](*sides)


def _side(argument: Any, known: Known) -> Range:
    if isinstance(argument, fx.Node):
        return known[argument]
    return Range(argument, argument) if isinstance(argument, int | float) else ANY
