"""Elementwise operators, one row each: when they are zero, where they have a value, between which bounds it lies.

``row(names, law, ...)``: aliases share a row. The law is when the result is zero at a removed index (``Vanish``), the
other columns are those of ``Traits``. What PyTorch tags as pointwise needs no row to be typed: without one it keeps no
zero, and has a value where it can be tried on numbers that are known. ``untagged``: elementwise by its definition,
though the composite operator carries no tag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from torch import fx

from shear_passes.ops.ranges import ANY, POSITIVE, Range, largest, ordered, value
from shear_passes.ops.registry import Vanish
from shear_passes.ops.traits import Bounds, Low, Role, Sign, traits

LAWS: dict[str, Vanish] = {}
UNTAGGED: set[str] = set()


class ZeroPlace(Enum):
    """Where a function that never falls is zero."""

    AT_ZERO = "at zero"
    NOWHERE = "nowhere"
    SOMEWHERE = "somewhere"


def row(names: str, law: Vanish = Vanish.NEVER, *, untagged: bool = False, **known: Any) -> None:
    """A row of the table."""
    LAWS.update(dict.fromkeys(names.split(), law))
    if untagged:
        UNTAGGED.update(names.split())
    traits(names, **known)


def grows(zeros: ZeroPlace = ZeroPlace.SOMEWHERE) -> Bounds:
    """Of functions of their first operand that never fall, with numbers for the rest."""

    def bounds(node: fx.Node, sides: Sequence[Range]) -> Range:
        first, x = node.args[0], sides[0]
        if not isinstance(first, fx.Node) or len(node.all_input_nodes) != 1:
            return ANY
        low, high = (value(node, {first: end}) for end in (x.low, x.high))
        return ordered(low, high, x.zero if zeros is ZeroPlace.AT_ZERO else zeros is ZeroPlace.SOMEWHERE)

    return bounds


def of(function: Callable[..., Range]) -> Bounds:
    """A function of the ranges of all arguments; anything, where there are options beside."""
    return lambda node, sides: ANY if node.kwargs else function(*sides)


def weighted(function: Callable[[Range, Range], Range], scaled: int = 1) -> Bounds:
    """A function of two ranges, that at place ``scaled`` times ``alpha``."""

    def bounds(node: fx.Node, sides: Sequence[Range]) -> Range:
        alpha = node.kwargs.get("alpha", 1)
        if len(sides) != 2 or node.kwargs.keys() - {"alpha"} or not isinstance(alpha, int | float):
            return ANY
        return function(*(side * Range(alpha, alpha) if at == scaled else side for at, side in enumerate(sides)))

    return bounds


def power(base: Range, exponent: Range) -> Range:
    """The range of a power."""
    if not exponent.single:
        return POSITIVE if base.positive else ANY
    number = exponent.low
    if number < 0:
        return power(base, -exponent).inverse()
    if number == 0:
        return Range(1, 1)
    if base.low < 0 and number % 2 == 0:
        base = base.size()
    return ANY if base.low < 0 else Range(_raised(base.low, number), _raised(base.high, number), base.zero)


def _raised(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


ANY_OF, ALL, FIRST = Vanish.ANY, Vanish.ALL, Vanish.FIRST
SAME = grows(ZeroPlace.AT_ZERO)
NO_ZERO = grows(ZeroPlace.NOWHERE)

# Sums: zero where every operand is.
row("add", ALL, total=True, bounds=weighted(lambda a, b: a + b), low=Low.SUM, sign=Sign.BOTH, role=Role.SUM)
row(
    "sub subtract",
    ALL,
    total=True,
    bounds=weighted(lambda a, b: a + -b),
    low=Low.DIFFERENCE,
    role=Role.DIFFERENCE,
    untagged=True,
)
row("rsub", ALL, total=True, bounds=weighted(lambda a, b: b + -a, scaled=0), untagged=True)
row("maximum fmax", ALL, total=True, bounds=of(largest), untagged=True)
row("minimum fmin", ALL, total=True, bounds=of(lambda a, b: -largest(-a, -b)), untagged=True)
row("addcmul hypot", ALL, total=True)
row("bitwise_or or ior logical_or complex", ALL, total=True, untagged=True)

# Products: zero where one factor is.
row(
    "mul multiply", ANY_OF, total=True, bounds=of(lambda a, b: a * b), low=Low.SCALED, sign=Sign.BOTH,
    role=Role.PRODUCT, untagged=True,
)  # fmt: skip
row("bitwise_and and iand logical_and", ANY_OF, total=True, untagged=True)

# Quotients and powers: zero where the first operand is.
row(
    "div divide true_divide", FIRST, divisor=1, bounds=of(lambda a, b: a * b.inverse()), low=Low.SCALED, sign=Sign.BOTH,
    untagged=True,
)  # fmt: skip
row("floor_divide fmod remainder", FIRST, divisor=1, untagged=True)
row("ldexp", FIRST, total=True, untagged=True)
row("pow", FIRST, power=True, bounds=of(power))
traits("pow.Tensor_Scalar", role=Role.SQUARE)
row("float_power", power=True, bounds=of(power), untagged=True)
row("addcdiv", divisor=2)
row("reciprocal", divisor=0, bounds=of(lambda x: x.inverse()))
row("rsqrt", interval=True, bounds=of(lambda x: power(x, Range(-0.5, -0.5))))

# Functions that are zero at zero.
row("abs absolute", FIRST, total=True, bounds=of(lambda x: x.size()), sign=Sign.NOT_NEGATIVE, untagged=True)
row(
    "square", FIRST, total=True, bounds=of(lambda x: power(x, Range(2, 2))), sign=Sign.NOT_NEGATIVE, role=Role.SQUARE,
    untagged=True,
)  # fmt: skip
row("neg negative", FIRST, total=True, bounds=of(lambda x: -x), untagged=True)
row("positive sgn sign frac tan elu gelu hardshrink leaky_relu softshrink", FIRST, total=True)
row("clone", FIRST, total=True, copies=True)
row("silu mish celu selu hardswish nan_to_num", FIRST, total=True, untagged=True)
row("relu", FIRST, total=True, bounds=grows(), low=Low.ZERO, sign=Sign.NOT_NEGATIVE, idempotent=True)
row("relu6", FIRST, total=True, bounds=grows(), idempotent=True, untagged=True)
row("tanh erf expm1 sinh asinh atan softsign", FIRST, total=True, bounds=SAME)
row("ceil floor round trunc", FIRST, total=True, bounds=grows())
row("sin", FIRST, total=True, bounds=of(lambda x: Range(-1, 1)))
row("sqrt", FIRST, interval=True, bounds=SAME, sign=Sign.FIRST, keeps_order=True)
row("log1p asin atanh", FIRST, interval=True, bounds=SAME)

# Functions that are something else there; those between bounds see to zero by their own rule.
row("clamp clamp_max clip hardsigmoid", total=True, bounds=grows())
row("clamp_min hardtanh", total=True, bounds=grows(), idempotent=True)
row("sigmoid exp", total=True, bounds=NO_ZERO, low=Low.ZERO, sign=Sign.NOT_NEGATIVE, keeps_order=True)
row("softplus", total=True, bounds=NO_ZERO, low=Low.ZERO, sign=Sign.NOT_NEGATIVE, keeps_order=True, untagged=True)
row("exp2", total=True, bounds=NO_ZERO)
row("cos", total=True, bounds=of(lambda x: Range(-1, 1)))
row("cosh", total=True, bounds=of(lambda x: Range(1, math.inf)))
row("log log2 log10 acosh logit", interval=True, bounds=grows())
row("erfinv", interval=True, bounds=SAME)
row("acos", interval=True)
row("log_sigmoid threshold rrelu polar isnan isinf isfinite", total=True, untagged=True)
row(
    "angle atan2 conj_physical copysign deg2rad rad2deg erfc gcd lcm heaviside i0 lerp logaddexp logaddexp2", total=True
)
row("nextafter sinc signbit isneginf isposinf max min", total=True)
row("special_airy_ai special_bessel_j0 special_bessel_j1 special_erfcx special_i0e special_i1 special_i1e", total=True)
row("special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1", total=True)
row("special_spherical_bessel_j0", total=True)

# Comparisons, bits, choices by a mask.
row("eq ne ge gt le lt logical_xor bitwise_xor", total=True)
row("greater greater_equal less less_equal not_equal xor ixor lshift rshift", total=True, untagged=True)
row("bitwise_left_shift bitwise_right_shift ilshift irshift", total=True)
row("logical_not bitwise_not", total=True, inverts=True)
row("where", total=True, bounds=of(lambda _, a, b: a | b), untagged=True)
row(
    "masked_fill", total=True, bounds=of(lambda x, _, filled: x | filled), low=Low.FILLED, sign=Sign.BOTH, untagged=True
)
