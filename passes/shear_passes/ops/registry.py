"""The table from operator to typing rule, and what a rule may say about the call it types.

A rule takes the call's arguments with every tensor replaced by its dims and returns the dims of the result. While it
runs it equates dims, freezes what it cannot follow, and records which dims the operator contracts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import torch
from torch import fx

from shear_ir.axes import Dim, Dims, Hold, axis, freeze, unify
from shear_ir.program import Shape

Results = list[Dims]
Rule = Callable[..., "Dims | Results"]
Constants = Callable[..., "dict[int, Any]"]
R = TypeVar("R", bound=Callable[..., Any])


class Barrier(Exception):
    """Raised by a rule that meets a form of its operator it does not follow."""


class Vanish(Enum):
    """When the result of an operator is zero at a removed index, given which operands are."""

    NEVER = "never"
    ALL = "all"
    """Every operand that is read must be zero there: sums, selections, unary functions with f(0) = 0."""
    ANY = "any"
    """One factor that is zero there is enough: products."""
    MOVED = "moved"
    """The operator only moves elements: those at the index come from operands that carry it."""
    FIRST = "first"
    """The first operand decides: quotients, scaling by a factor that does not depend on the index."""
    ALWAYS = "always"
    """The result is zero everywhere."""
    NUMBERED = "numbered"
    """The numbers that the call reads never name a removed index: it is zero there where its first operand is."""


@dataclass(frozen=True)
class Operand:
    """One side of a contraction: its node and the dims that remain after the contraction."""

    node: fx.Node
    free: Dims


@dataclass(frozen=True)
class Contraction:
    """``out[...] = sum over the dims in ``over`` of the product of the operands, plus ``added``.

    ``mean``: divided by the size of ``over``. ``mixed``: a convex combination over an axis that is frozen, as in
    attention's probabilities times values. ``inner``: what it makes is an operand of the call's next contraction, as
    attention's scores are. The value of a call is the sum of its other contractions.
    """

    node: fx.Node
    over: Dims
    operands: tuple[Operand, ...]
    added: tuple[fx.Node, ...] = ()
    mean: bool = False
    mixed: bool = False
    inner: bool = False


class Need(Enum):
    """What removed entries have to be where they stand among kept ones, so that leaving them out changes nothing."""

    LOSING = "losing"
    """Chosen by size: no removed entry is larger than a kept one."""
    WEIGHTLESS = "weightless"
    """Weighed by its exponential: minus infinity."""
    NOTHING = "nothing"
    """Summed up one after the other: zero."""
    REPEATED = "repeated"
    """The end of an interval that begins at the entry before: equal to that."""


@dataclass(frozen=True)
class Ranking:
    """Entries of ``operand`` along ``over`` are compared with each other.

    ``count``: how many of them are chosen, 0 where none is; ``named``: whether their numbers are read, and not only
    how large they are, or for a softmax, whether what it weighs is stacked along the axis, as experts are. ``reason``:
    what holds the axis unless removed entries are known to be what ``need`` says.
    """

    node: fx.Node
    operand: fx.Node
    over: Dim
    need: Need
    reason: str
    count: int = 0
    named: bool = False


@dataclass
class Site:
    """One operator call while its rule runs."""

    node: fx.Node
    shapes: tuple[Shape, ...]
    vanish: Vanish = Vanish.NEVER
    contractions: list[Contraction] = field(default_factory=list)
    numbers: Mapping[fx.Node, Dim] = field(default_factory=dict)
    """Integer operands whose entries are numbers of the indices of a dim."""
    rankings: list[Ranking] = field(default_factory=list)
    aligned: list[tuple[Dim, int]] = field(default_factory=list)
    made_numbers: dict[int, Dim] = field(default_factory=dict)
    understood: set[fx.Node] = field(default_factory=set)

    @property
    def shape(self) -> Shape:
        """Shape of the only result."""
        return self.shapes[0]

    @property
    def where(self) -> str:
        """The call as people read it."""
        return f"%{self.node.name} = {op_name(self.node)}"

    def fresh(self, shape: Iterable[int] | None = None) -> Dims:
        """New atoms for the sizes of ``shape`` (default: of the only result)."""
        return tuple(axis(size) for size in (self.shape if shape is None else shape))

    def equate(self, left: Dim, right: Dim) -> None:
        """The two dims have the same indices; where that has no solution both freeze."""
        unify(left, right, self.where, self.node.name)

    def freeze(self, dims: Iterable[Dim], reason: str, hold: Hold = Hold.HARD) -> None:
        """No index of these dims can be removed, because of this call."""
        for dim in dims:
            freeze(dim, f"{reason} at {self.where}", hold, self.node.name)

    def barrier(self, reason: str) -> Results:
        """The call is not understood: everything it reads and makes is frozen."""
        raise Barrier(reason)

    def contract(
        self,
        over: Sequence[Dim],
        operands: Iterable[tuple[int | str | fx.Node, Sequence[Dim]]],
        *,
        added: Iterable[int | str | fx.Node] = (),
        mean: bool = False,
        mixed: bool = False,
        inner: bool = False,
    ) -> None:
        """Record a contraction; operands and addends are named by their place among the call's arguments."""
        sides = []
        for place, free in operands:
            node = self._argument(place)
            if node is not None:
                sides.append(Operand(node, tuple(free)))
        extra = tuple(n for n in (self._argument(place) for place in added) if n is not None)
        self.contractions.append(Contraction(self.node, tuple(over), tuple(sides), extra, mean, mixed, inner))

    def rank(self, place: int | str, over: Dim, need: Need, reason: str, count: int = 0) -> None:
        """Entries of an operand are compared along ``over``: see ``Ranking``."""
        operand = self._argument(place)
        if operand is None:
            self.freeze([over], reason)
        else:
            unpacked = [u.args[1] for u in self.node.users if getattr(u.target, "__name__", "") == "getitem"]
            named = count > 0 and (len(self.shapes) == 1 or 1 in unpacked)
            self.rankings.append(Ranking(self.node, operand, over, need, f"{reason} at {self.where}", count, named))

    def align(self, dims: Iterable[Dim], *, bytes: int) -> None:
        """The kernel wants rows over each of these dims to be a multiple of so many bytes."""
        self.aligned.extend((dim, bytes) for dim in dims)

    def named_by(self, operand: Any) -> Dim | None:
        """The dim whose indices the entries of an operand number; the rule that asks says what follows from it."""
        found = self.numbers.get(operand) if isinstance(operand, fx.Node) else None
        if found is not None:
            self.understood.add(operand)
        return found

    def join_numbers(self, operands: Sequence[Any]) -> None:
        """Numbers laid side by side are numbers of one dim, where all operands have such."""
        if operands and all(isinstance(o, fx.Node) and o in self.numbers for o in operands):
            first, *others = [self.named_by(o) for o in operands]
            assert first is not None
            for other in others:
                self.equate(first, other or first)
            self.name(first)

    def name(self, dim: Dim, result: int = 0) -> None:
        """The entries of a result are numbers of the indices of ``dim``."""
        self.made_numbers[result] = dim

    def _argument(self, place: int | str | fx.Node) -> fx.Node | None:
        if isinstance(place, fx.Node):
            return place
        if isinstance(place, str):
            value = self.node.kwargs.get(place)
        else:
            value = self.node.args[place] if place < len(self.node.args) else None
        return value if isinstance(value, fx.Node) else None


@dataclass(frozen=True)
class Entry:
    """What the table knows of an operator."""

    rule: Rule
    vanish: Vanish
    resize: Callable[..., Any] | None = None


_RULES: dict[Any, Entry] = {}


def rule(*ops: Any, vanish: Vanish = Vanish.NEVER) -> Callable[[R], R]:
    """Make the function below the typing rule of ``ops``; ``vanish`` says when their results are zero.

    An operator that exists only once its library is imported is given by name: ``"library::operator"``.
    """

    def register(function: R) -> R:
        for op in ops:
            if op in _RULES:
                raise ValueError(f"two rules for {op}")
            _RULES[op] = Entry(function, vanish)
        return function

    return register


def resize(*ops: Any) -> Callable[[R], R]:
    """Make the function below rewrite the shape constants of ``ops`` after indices are removed.

    It gets the call's ``Change`` and returns nothing: it edits the call's arguments, or replaces the call.
    """

    def register(function: R) -> R:
        for op in ops:
            entry = _RULES[op]
            _RULES[op] = Entry(entry.rule, entry.vanish, function)
        return function

    return register


def resized_ops() -> tuple[Any, ...]:
    """The operators whose shape constants are rewritten."""
    return tuple(op for op, entry in _RULES.items() if entry.resize is not None)


def entry_of(op: Any) -> Entry | None:
    """The table's row for ``op``; None when there is no rule."""
    return _RULES.get(op) or (_RULES.get(op.name()) if isinstance(op, torch._ops.OpOverload) else None)  # type: ignore[no-untyped-call]


def op_name(node: fx.Node) -> str:
    """The operator as the text IR spells it: ``aten.linear`` for ``aten.linear.default``."""
    return target_name(node.target)


@cache
def target_name(target: Any) -> str:
    """The operator of a call's target."""
    text = str(target) if hasattr(target, "overloadpacket") else getattr(target, "__name__", "call")
    return text.removesuffix(".default")


def wrap(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + rank if dim < 0 else dim
