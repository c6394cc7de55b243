"""What is known of an operator beside its typing rule: the row that analyses read, so that they name no operators.

A row belongs to an operator's name without its library ``aten``, its overload, and the underscores of those that write
in place: ``relu`` for ``aten.relu_.default``. Elementwise operators have theirs in ``elementwise``, all others beside
their typing rule. What a row does not say is the safe answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any

from torch import fx

from shear_passes.ops.ranges import Range
from shear_passes.ops.registry import target_name

Bounds = Callable[[fx.Node, Sequence[Range]], Range]
"""The range of an elementwise result, given those of the arguments in their order."""


class Low(Enum):
    """What an operator makes of operands that are minus infinity at a removed index."""

    LOST = "lost"
    """Nothing is known."""
    SUM = "sum"
    """Minus infinity where one of the first two operands is."""
    DIFFERENCE = "difference"
    """Where the first is and the second is not."""
    SCALED = "scaled"
    """Where the first is, times or over a number above zero."""
    FILLED = "filled"
    """Where the first is, and what is filled in (argument 2) as well."""
    REDUCED = "reduced"
    """Where the first is, at the indices that it does not reduce."""
    SCATTERED = "scattered"
    """Where the first is, at the numbers that the call reads."""
    SHARES = "shares"
    """Zero, along the dim (argument 1) that it runs over: a softmax."""
    LOG_SHARES = "log shares"
    """Minus infinity, along that dim."""
    ZERO = "zero"
    """Zero where the first is."""


class Sign(Enum):
    """When no entry of a result is below zero."""

    ANY = "any"
    NOT_NEGATIVE = "not negative"
    """Always."""
    FIRST = "first"
    """Where none of the first operand is."""
    BOTH = "both"
    """Where none of the first operand and of the last is."""


class Layout(Enum):
    """Where in memory a result lies that has the elements of the first operand."""

    OWN = "own"
    """In memory of its own, or the operator says by its schema that it is a view."""
    SAME = "same"
    """In that of the operand, where nothing is to be changed."""
    BY_STRIDES = "by strides"
    """A view or a copy, as the operand lies in memory."""


class Reduces(Enum):
    """How the entries of a result follow from those that it is reduced from, for the bounds of its range."""

    SUM = "sum"
    MEAN = "mean"
    NORM = "norm"
    SPREAD = "spread"
    """A variance: not negative."""
    SHARE = "share"
    """Between zero and one."""


class Asks(Enum):
    """What a call that makes no tensor reads of one beside its entries."""

    SIZE = "size"
    """The size of a dim, which is recomputed after a cut."""
    LAYOUT = "layout"
    """How many entries it has, or how they lie in memory."""


class Role(Enum):
    """What a call does with its parameter, for the names that people give to axes and modules."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    CONVOLUTION = "convolution"
    ADAPTED_CONVOLUTION = "adapted convolution"
    SUM = "sum"
    DIFFERENCE = "difference"
    PRODUCT = "product"
    SQUARE = "square"
    """A power by a number."""


@dataclass(frozen=True)
class WeightedProduct:
    """Which argument of a product is which: the places of value and weight, their dims that are summed over.

    ``groups``: in how many the channels of a convolution are.
    """

    value: int
    weight: int
    feature: int
    dim: int
    groups: int = 1


@dataclass(frozen=True)
class Traits:
    """One row; what it does not say is the safe answer."""

    # Where it has a value.
    total: bool = False
    """Wherever its operands have one."""
    divisor: int | None = None
    """Unless the argument at this place is zero."""
    power: bool = False
    """As a power has."""
    interval: bool = False
    """On an interval of its only number, so between two numbers if at both."""
    epsilon: int | None = None
    """Of a norm, the place of what it adds to the variance, so that it is not zero where all entries are."""

    # Which value it has.
    bounds: Bounds | None = None
    """Of an elementwise result."""
    reduces: Reduces | None = None
    picks: bool = False
    """The (first) result has entries of the first operand."""
    along: bool = False
    """The result has the dim that it works along, and at one index of it entries of others."""
    cumulates: bool = False
    """Each entry is the sum of those before."""
    fills: int | None = None
    """The place of the number that all entries are."""
    ones: bool = False
    """All entries are one."""
    pads: bool = False
    """Zeros may stand beside the entries of the operand."""
    fills_in: bool = False
    """Entries that the operand does not have may stand beside its own."""
    sign: Sign = Sign.ANY
    low: Low = Low.LOST
    keeps_order: bool = False
    """It grows with its operand and makes no two numbers equal."""
    inverts: bool = False
    """What is true becomes false."""
    idempotent: bool = False
    """Twice is once."""
    asks: Asks | None = None

    # Where elements come from and lie.
    copies: bool = False
    """In memory of their own, though the operator only moves them."""
    repeats: bool = False
    """Copies are counted by an axis of its own, which may prove to be one that is already there."""
    mixes: bool = False
    """Moved, and not only from the first operand."""
    converts: bool = False
    """All are those of the first operand, perhaps in another type or memory."""
    drops: bool = False
    """The same, but in training, as argument 2 says."""
    order: Callable[[fx.Node, int], list[int]] | None = None
    """Of a transpose of so many dims: the place that each had."""
    leads: bool = False
    """What it chooses or repeats stands before the dims that stay last."""
    chooses: bool = False
    """Some of a parameter's entries, or all of them, adapted or scaled."""
    layout: Layout = Layout.OWN

    # What it does with parameters.
    products: Callable[[fx.Node, Callable[[fx.Node], int]], list[WeightedProduct]] | None = None
    """The ways in which a call may be a weight times a value, given the number of dims of its operands."""
    factors: tuple[int, int] | None = None
    """The places of its two matrices, of those products that every linear map comes down to when it runs."""
    scores: bool = False
    """It makes scores where one factor is a parameter, as a router does."""
    role: Role | None = None


UNKNOWN = Traits()
"""The row of an operator that has none."""

_ROWS: dict[str, Traits] = {}


def traits(names: str, **known: Any) -> None:
    """Say what is known of the operators of these names, divided by spaces; a name may get more than one share."""
    for name in names.split():
        _ROWS[name] = replace(_row(name), **known)
    traits_of_target.cache_clear()


def known_rows() -> Mapping[str, Traits]:
    """The rows of all operators that have one, by name."""
    return MappingProxyType(_ROWS)


def traits_of(node: fx.Node) -> Traits:
    """The row of a call's operator; of anything else, that of an operator nothing is known of."""
    return traits_of_target(node.target) if node.op == "call_function" else UNKNOWN


@cache
def traits_of_target(target: Any) -> Traits:
    """The row of an operator."""
    own = target_name(target).removeprefix("aten.")
    return _ROWS[own] if own in _ROWS else _row(row_name(target))


def _row(name: str) -> Traits:
    """That of an overload, ``to.dtype_layout``, begins as that of its operator."""
    bare, _, overload = name.partition(".")
    return _ROWS.get(name) or (_ROWS.get(bare, UNKNOWN) if overload else UNKNOWN)


def row_name(target: Any) -> str:
    """The name that an operator's row has."""
    library, _, name = target_name(target).partition(".")
    if not name:  # a function of Python's
        return ""
    bare = name.partition(".")[0].strip("_")
    return bare if library == "aten" else f"{library}.{bare}"
