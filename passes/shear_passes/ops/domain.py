"""Where an elementwise operator has a value: a quotient has none whose divisor is zero, a logarithm none below it.

An operator that is not known to have one everywhere has one where it can be tried: on numbers that are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from shear_passes.ops.ranges import ANY, Known, Range, value

_TOTAL = {
    "abs", "absolute", "add", "addcmul", "and", "angle", "asinh", "atan", "atan2", "bitwise_and",
    "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "ceil", "celu", "clamp",
    "clamp_max", "clamp_min", "clip", "clone", "complex", "conj_physical", "copysign", "cos", "cosh", "deg2rad",
    "elu", "eq", "erf", "erfc", "exp", "exp2", "expm1", "floor", "fmax", "fmin", "frac", "gcd", "ge", "gelu",
    "greater", "greater_equal", "gt", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "heaviside", "hypot",
    "i0", "iand", "ilshift", "ior", "irshift", "isfinite", "isinf", "isnan", "isneginf", "isposinf", "ixor", "lcm",
    "ldexp", "le", "leaky_relu", "lerp", "less", "less_equal", "log_sigmoid", "logaddexp", "logaddexp2",
    "logical_and", "logical_not", "logical_or", "logical_xor", "lshift", "lt", "masked_fill", "max", "maximum", "min",
    "minimum", "mish", "mul", "multiply", "nan_to_num", "ne", "neg", "negative", "nextafter", "not_equal", "or",
    "polar", "positive", "rad2deg", "relu", "relu6", "round", "rrelu", "rshift", "rsub", "selu", "sgn", "sigmoid",
    "sign", "signbit", "silu", "sin", "sinc", "sinh", "softplus", "softshrink", "softsign", "special_airy_ai",
    "special_bessel_j0", "special_bessel_j1", "special_erfcx", "special_i0e", "special_i1", "special_i1e",
    "special_log_ndtr", "special_modified_bessel_i0", "special_modified_bessel_i1", "special_spherical_bessel_j0",
    "square", "sub", "subtract", "tan", "tanh", "threshold", "trunc", "where", "xor",
}  # fmt: skip
"""Operators that have a value wherever their operands have one, ``__and__`` without its underscores."""

_DIVISORS = {
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide", "fmod", "remainder"), 1),
    "addcdiv": 2,
    "reciprocal": 0,
}
"""Operators that have one unless the argument at this place is zero."""

_POWERS = {"pow", "float_power"}

_INTERVALS = {
    "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acos", "acosh", "asin", "atanh", "erfinv", "logit",
}  # fmt: skip
"""Functions of one number that have one on an interval, so between two numbers if at both."""

_LEAST = 1e-300


def conditional(name: str, node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of an elementwise call on which it depends whether it has a value."""
    if name.strip("_") in _TOTAL:
        return ()
    if name in _POWERS:
        return tuple(_nodes(node.args)) if _exponent(node) is None else ()
    place = _DIVISORS.get(name, 0 if name in _INTERVALS else None)
    return tuple(_nodes(node.args if place is None else [node.args[place]]))


def has_value(name: str, node: fx.Node, known: Known) -> bool:
    """Whether an elementwise call has one for all numbers in the ranges of its operands."""
    if name in _DIVISORS:
        divisor = node.args[_DIVISORS[name]]
        return isinstance(divisor, fx.Node) and not known[divisor].zero
    if name in _INTERVALS:
        (operand,) = node.all_input_nodes
        return all(math.isfinite(value(node, {operand: end})) for end in _ends(known[operand]))
    if name in _POWERS and _power_has_value(node, known):
        return True
    numbers = {operand: known[operand].low for operand in node.all_input_nodes if known[operand].single}
    return len(numbers) == len(node.all_input_nodes) and math.isfinite(value(node, numbers))


def _nodes(args: Any) -> Iterator[fx.Node]:
    yield from dict.fromkeys(a for a in args if isinstance(a, fx.Node))


def _ends(operand: Range) -> tuple[float, float]:
    """Both bounds, or the nearest numbers to them."""
    low = operand.low if operand.zero or operand.low else _LEAST
    high = operand.high if operand.zero or operand.high else -_LEAST
    return max(low, -1 / _LEAST), min(high, 1 / _LEAST)


def _exponent(node: fx.Node) -> int | None:
    """A whole number that is not negative, to which everything has a power; 0 where only the base counts."""
    base, power = node.args
    if isinstance(base, int | float):
        return 0 if base > 0 else None
    return int(power) if isinstance(power, int | float) and power >= 0 and power == int(power) else None


def _power_has_value(node: fx.Node, known: Known) -> bool:
    base, power = (known[a] if isinstance(a, fx.Node) else _number(a) for a in node.args)
    if power.single and power.low % 1 == 0:
        return power.low >= 0 or not base.zero
    return base.positive or (base.low >= 0 and power.low >= 0)


def _number(argument: Any) -> Range:
    return Range(argument, argument) if isinstance(argument, int | float) else ANY
