"""Base maps with low-rank branches, found by structure: ``base(x) + scale * B(dropout(A(x)))``, one branch or several.

What a module is called does not matter, nor what class it is of: a branch is a map from x by a parameter A, then one
by a parameter B, scaled by a number, and added to another map of the same x by a parameter. A magnitude makes it DoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.lora_experts import stacked
from shear_passes.analysis.lora_magnitude import Gains
from shear_passes.analysis.lora_maps import VIEWS, Map, Maps, composed_kind, is_conversion
from shear_passes.ops.registry import op_name


@dataclass(frozen=True, eq=False)
class Branch:
    """One adapter: the nodes of its parameters, ``(rank, in, ...)`` and ``(out, rank, ...)``; dropout 0 for none."""

    a: fx.Node
    b: fx.Node
    scale: float
    bias: fx.Node | None = None
    dropout: float = 0.0
    magnitude: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class Composed:
    """One composed operator. ``root``: the call that makes its value; ``base``: the base map and its parameters.

    ``inside``: the calls that a single one would stand for, without those that only convert or lay out.
    """

    root: fx.Node
    base: Map
    branches: tuple[Branch, ...]
    inside: frozenset[fx.Node] = field(default=frozenset(), repr=False)

    @property
    def raised(self) -> bool:
        """Whether it already is a single call."""
        return self.root is self.base.node

    @property
    def exclusive(self) -> bool:
        """Whether nothing else reads what is made on the way, so that a single call computes nothing twice."""
        return all(self._within(user) for node in self.inside - {self.root} for user in node.users)

    def _within(self, node: fx.Node) -> bool:
        converted = is_conversion(node) and bool(node.users)
        return node in self.inside or (converted and all(map(self._within, node.users)))


@dataclass(frozen=True)
class FindLora(Analysis[tuple[Composed, ...]]):
    """The composed operators of a program in graph order, raised to single calls or not."""

    def run(self, program: Program, analyses: AnalysisManager) -> tuple[Composed, ...]:
        """Linear in the number of nodes."""
        return find_lora(program)


def find_lora(program: Program) -> tuple[Composed, ...]:
    """What ``FindLora`` finds."""
    finder = _Finder(program)
    for node in program.calls():
        finder.look_at(node)
    return tuple(finder.ended(made) for made in finder.found.values())


@dataclass(frozen=True, eq=False)
class _Term:
    """What a sum may add to a base: a branch, the calls that make it and the nodes its A may have read as x."""

    branch: Branch
    kind: str
    options: tuple[Any, ...]
    reads: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.maps = Maps(program)
        self.gains = Gains(self.maps)
        self.found: dict[fx.Node, Composed] = {}

    def look_at(self, node: fx.Node) -> None:
        """Note the composed operator that ends, for now, with ``node``."""
        if composed_kind(node) is not None:
            self.found[node] = _raised(node)
        elif (adapted := stacked(self.maps, node)) is not None:
            stack, a, b, scale = adapted
            self.found[node] = Composed(node, stack, (Branch(a, b, scale),), stack.inside)
        elif _is_sum(node):
            for base, term in _orders(node):
                made = self._joined(node, self.maps.plain(base), self.maps.plain(term))
                if made is not None:
                    self.found[made.root] = made
                    return

    def _joined(self, node: fx.Node, left: fx.Node, right: fx.Node) -> Composed | None:
        so_far = self.found.get(left)
        gained = self._of_gained_base(left, right)
        base = gained[0] if gained else self.maps.of(left) if so_far is None else so_far.base
        if base is None or (so_far is not None and so_far.raised):
            return None
        term = gained[1] if gained else self._term(right) or (None if so_far else self._with_gain(base, right))
        if term is None or (term.kind, term.options) != (base.kind, base.options) or base.x not in term.reads:
            return None
        before = Composed(left, base, (), base.inside) if so_far is None else so_far
        self.found.pop(left, None)
        return Composed(node, base, (*before.branches, term.branch), before.inside | term.inside | {node})

    def ended(self, made: Composed) -> Composed:
        """With the conversion to the dtype of the base that alone reads the value, where there is one."""
        user = next(iter(made.root.users), made.root)
        if made.raised or len(made.root.users) != 1 or not is_conversion(user):
            return made
        same = self.program.type(user) == self.program.type(made.base.node)
        return replace(made, root=user, inside=made.inside | {user}) if same else made

    def _term(self, node: fx.Node) -> _Term | None:
        """``scale * B(A(x))`` with the scale before or after B; a bias of B is scaled as well."""
        inside: set[fx.Node] = set()
        node, scale = self._unscaled(node, inside)
        outer = self.maps.of(node)
        if outer is None or outer.turned or not outer.pointwise:
            return None
        low, early = self._unscaled(outer.x, inside)
        inner = self.maps.of(low)
        if inner is None or inner.bias is not None or inner.turned != (inner.kind == "embedding"):
            return None
        if (early != 1.0 and outer.bias is not None) or outer.kind != ("conv" if inner.kind == "conv" else "linear"):
            return None
        reads, dropout = self._reads(inner.x)
        branch = Branch(inner.weight, outer.weight, scale * early, outer.bias, dropout)
        return _Term(branch, inner.kind, inner.options, reads, frozenset({*inside, *outer.inside, *inner.inside}))

    def _unscaled(self, node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, float]:
        scale = 1.0
        while True:
            node = self.maps.plain(node)
            number = _factor(node)
            if number is None:
                return node, scale
            inside.add(node)
            scale *= number
            node = next(a for a in node.args if isinstance(a, fx.Node))

    def _reads(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], float]:
        """The nodes from which ``node`` differs by conversions and by dropout that is off, and its probability."""
        dropout, reads = 0.0, []
        while True:
            node = self.maps.plain(node)
            reads.append(node)
            if op_name(node) == "aten.dropout" and node.args[2] is False:
                dropout = float(node.args[1])  # type: ignore[arg-type]
            elif not is_conversion(node):
                return tuple(reads), dropout
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source

    def _with_gain(self, base: Map, node: fx.Node) -> _Term | None:
        """DoRA: ``(g - 1) * (base - bias) + g * scale * B(A(x))``."""
        for shift, scaled in _orders(node):
            gain = self._less_one(shift, base)
            term = None if gain is None else self._gained(base, scaled, gain)
            if term is not None:
                return replace(term, inside=term.inside | {node, shift, *shift.all_input_nodes} - {gain, base.node})
        return None

    def _of_gained_base(self, left: fx.Node, right: fx.Node) -> tuple[Map, _Term] | None:
        """DoRA of a base without a bias: ``g * base + g * scale * B(A(x))``."""
        if op_name(left) != "aten.mul.Tensor":
            return None
        for gain, inner in _orders(left):
            base = self.maps.of(self.maps.plain(inner))
            term = None if base is None or base.bias is not None else self._gained(base, right, gain)
            if base is not None and term is not None:
                return base, replace(term, inside=term.inside | {left})
        return None

    def _gained(self, base: Map, node: fx.Node, gain: fx.Node) -> _Term | None:
        """``g * scale * B(A(x))`` with the magnitude that makes g."""
        inside: set[fx.Node] = set()
        node, scale = self._unscaled(node, inside)
        rest = [a for a in node.args if a is not gain] if op_name(node) == "aten.mul.Tensor" else []
        term = self._term(rest[0]) if len(rest) == 1 and isinstance(rest[0], fx.Node) else None
        if term is None:
            return None
        branch = replace(term.branch, scale=term.branch.scale * scale)
        magnitude = self.gains.magnitude(gain, base, branch.a, branch.b, branch.scale)
        if magnitude is None:
            return None
        return replace(term, branch=replace(branch, magnitude=magnitude), inside=term.inside | inside | {node})

    def _less_one(self, node: fx.Node, base: Map) -> fx.Node | None:
        """The gain g where ``node`` is ``(g - 1) * (base - bias)``."""
        for less, map_ in _orders(node) if op_name(node) == "aten.mul.Tensor" else ():
            if op_name(less) == "aten.sub.Tensor" and less.args[1] == 1 and self._is_free_of_bias(map_, base):
                gain = less.args[0]
                return gain if isinstance(gain, fx.Node) else None
        return None

    def _is_free_of_bias(self, node: fx.Node, base: Map) -> bool:
        if base.bias is None:
            return self.maps.plain(node) is base.node
        if op_name(node) != "aten.sub.Tensor" or node.kwargs:
            return False
        value, bias = node.args
        if isinstance(bias, fx.Node) and op_name(bias) in VIEWS:
            bias = bias.args[0]
        return value is base.node and bias is base.bias


def _raised(node: fx.Node) -> Composed:
    """A call of a composed operator as what it stands for."""
    given: Any = node.kwargs
    count = len(given["A"])
    names = {"a": "A", "b": "B", "scale": "scale", "bias": "B_bias", "dropout": "dropout", "magnitude": "magnitude"}
    columns = {field: given[name] for field, name in names.items() if given.get(name) is not None}
    branches = tuple(Branch(**{field: values[k] for field, values in columns.items()}) for k in range(count))
    return Composed(node, Map.of_composed(node), branches, frozenset([node]))


def _is_sum(node: fx.Node) -> bool:
    return (
        op_name(node) in ("aten.add.Tensor", "aten.add_.Tensor")
        and not node.kwargs
        and all(isinstance(a, fx.Node) for a in node.args)
    )


def _orders(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The two operands of a call, and the other way round; nothing where it does not have two."""
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    if len(nodes) == 2:
        yield nodes[0], nodes[1]
        yield nodes[1], nodes[0]


def _factor(node: fx.Node) -> float | None:
    """The number that a call multiplies its operand by; None when it does something else."""
    if op_name(node) in ("aten.mul.Tensor", "aten.mul_.Tensor"):
        return next((float(a) for a in node.args if isinstance(a, int | float)), None)
    return None
