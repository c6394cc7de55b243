"""Where an elementwise operator has a value: a quotient has none whose divisor is zero, a logarithm none below it.

An operator that is not known to have one everywhere has one where it can be tried: on numbers that are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from shear_passes.ops.ranges import ANY, KnownRanges, Range, value
from shear_passes.ops.traits import traits_of

_LEAST = 1e-300


def conditional(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of an elementwise call on which it depends whether it has a value."""
    row = traits_of(node)
    if row.total:
        return ()
    if row.power:
        return tuple(_nodes(node.args)) if _exponent(node) is None else ()
    place = 0 if row.interval else row.divisor
    return tuple(_nodes(node.args if place is None else [node.args[place]]))


def has_value(node: fx.Node, known: KnownRanges) -> bool:
    """Whether an elementwise call has one for all numbers in the ranges of its operands."""
    row = traits_of(node)
    if row.divisor is not None:
        divisor = node.args[row.divisor]
        return isinstance(divisor, fx.Node) and not known[divisor].zero
    if row.interval:
        (operand,) = node.all_input_nodes
        return all(math.isfinite(value(node, {operand: end})) for end in _ends(known[operand]))
    if row.power and _power_has_value(node, known):
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


def _power_has_value(node: fx.Node, known: KnownRanges) -> bool:
    base, power = (known[a] if isinstance(a, fx.Node) else _number(a) for a in node.args)
    if power.single and power.low % 1 == 0:
        return power.low >= 0 or not base.zero
    return base.positive or (base.low >= 0 and power.low >= 0)


def bounds(node: fx.Node, known: KnownRanges) -> Range:
    """The range of an elementwise call; anything, where that is not known."""
    if all(known[operand].single for operand in node.all_input_nodes):
        made = value(node, {operand: known[operand].low for operand in node.all_input_nodes})
        if not math.isnan(made):
            return Range(made, made)
    found = traits_of(node).bounds
    return (
        ANY if found is None else found(node, [known[a] if isinstance(a, fx.Node) else _number(a) for a in node.args])
    )


def _number(argument: Any) -> Range:
    return Range(argument, argument) if isinstance(argument, int | float) else ANY
