"""Scores by which indices of an axis are chosen, as a router chooses experts: those of removed indices lose.

A removed expert is one that is never routed to. In the masked model the scores that the router's weights make for it
are minus infinity where an ordinary unit is zero: the product with a matrix that has a row per expert, and the entries
of a vector that has one. From there on the operators say what follows: a softmax makes zeros of it, a topk never
chooses it, counts of what was chosen are zero. Where that cannot be shown the axis is frozen, as in ``vanish``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from shear_ir.axes import Axis, Concat, Dim, Freezes, Product, atoms, resolve
from shear_ir.program import Program
from shear_passes.analysis.infer_axes import Axes
from shear_passes.ops.registry import Ranking, Vanish, op_name
from shear_passes.ops.traits import Low, traits_of

Atoms = frozenset[Axis]


@dataclass(frozen=True)
class Choice:
    """``count`` of the indices of ``over`` are chosen each time, from those that are still there.

    ``only``: of the indices of these atoms just so many are open to it, as of groups of experts of which some were
    chosen before; ``fewer``: how many single indices are closed to it.
    """

    node: str
    over: Dim
    count: int
    only: Mapping[Axis, int] = field(default_factory=dict)
    fewer: int = 0

    def open(self, sizes: Mapping[Axis, int]) -> int:
        """How many indices there are to choose from when atoms have these sizes, their own where none is given."""
        counts = [min(self.only.get(a, math.inf), sizes.get(a, a.size)) for a in atoms(self.over)]
        return int(math.prod(counts)) - self.fewer

    def least(self, atom: Axis) -> int:
        """How many indices of one atom have to stay while all others do."""
        fits = (n for n in range(1, atom.size + 1) if self.open({atom: n}) >= self.count)
        return next(fits, atom.size)


@dataclass(frozen=True)
class _Open:
    """Which candidates are left: see ``Choice``."""

    only: Mapping[Axis, int] = field(default_factory=dict)
    fewer: int = 0

    def also(self, other: _Open) -> _Open:
        """Where both leave a candidate."""
        return _Open({**self.only, **other.only}, self.fewer + other.fewer)


@dataclass
class Writes:
    """Which calls wrote to the memory of which values, as far as a walk has come."""

    position: dict[str, int] = field(default_factory=dict)
    home: dict[str, str] = field(default_factory=dict)
    at: dict[str, list[int]] = field(default_factory=dict)

    def note(self, call: fx.Node, written: fx.Node) -> None:
        """``call`` writes to the memory of ``written``."""
        self.at.setdefault(self.home[written.name], []).append(self.position[call.name])

    def between(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether a value was changed between where it was made and where it is read."""
        first, last = self.position[value.name], self.position[reader.name]
        return any(first < at < last for at in self.at.get(self.home[value.name], ()))


class RouterScores:
    """Which parameters make the scores of the chosen axes, by one walk back from every choice."""

    def __init__(self, program: Program, axes: Axes, writes: Writes, freezes: Freezes) -> None:
        self.program = program
        self.freezes = freezes
        self.axes = axes
        self.by_node: dict[str, list[Ranking]] = {}
        # What was scored by which tensor: its name and dim, by atom.
        self.routers: dict[Axis, dict[str, int]] = {}
        # Values that hold scores as they were made.
        self.made: dict[str, set[Axis]] = {}
        self.choices: list[Choice] = []
        for ranking in axes.rankings:
            self.by_node.setdefault(ranking.node.name, []).append(ranking)
        self.writes = writes
        named = [ranking for ranking in axes.rankings if ranking.named]
        stored = {a for dims in axes.of_param.values() for d in dims for a in atoms(d)} if named else set()
        for ranking in named:
            for atom in stored.intersection(atoms(ranking.over)):
                self._find_made(ranking, atom)
        for atom in list(self.routers):
            self._check_readers(atom)

    def made_at(self, node: fx.Node) -> Atoms:
        """The atoms of which the value is a score as it was made."""
        return frozenset(self.made.get(node.name, ()))

    def carries(self, node: fx.Node, atom: Axis) -> bool:
        """Whether some dim of a value has the atom."""
        return any(atom in set(atoms(d)) for dims in self.axes.of_node.get(node.name, []) for d in dims)

    def of_choice(self, node: fx.Node) -> tuple[fx.Node | None, bool]:
        """What a choice is from, where ``node`` has its results, and whether it has their numbers."""
        source = node.args[0] if getattr(node.target, "__name__", "") == "getitem" else None
        if not isinstance(source, fx.Node):
            return None, False
        return next((r.operand for r in self.by_node.get(source.name, ()) if r.count), None), bool(node.args[1] != 0)

    def _find_made(self, ranking: Ranking, atom: Axis) -> None:
        stack, seen = [ranking.operand], {ranking.operand}
        while stack:
            node = stack.pop()
            if not self._makes(node, atom):
                for source in node.all_input_nodes:
                    if source not in seen and self.carries(source, atom):
                        seen.add(source)
                        stack.append(source)

    def _makes(self, node: fx.Node, atom: Axis) -> bool:
        """Note a vector with an entry per index, or a product with a matrix with a row per index."""
        param = self.program.param(node)
        if param is not None:
            dims = [place for place, dim in enumerate(self.axes.dims(node)) if dim.size > 1]
            if len(dims) == 1 and param.kind != "constant" and param.type.dtype.is_floating_point:
                self._note(node, atom, param.name, dims[0])
            return True
        if not traits_of(node).scores:
            return False
        factors = [f for f in self._factors(node) if self.carries(f, atom)]
        matrix = self._parameter(factors[0]) if len(factors) == 1 else None
        if matrix is None:
            return False
        name = self.program.of_placeholder[matrix.name]
        place = next(i for i, dim in enumerate(self.axes.dims(matrix)) if atom in set(atoms(dim)))
        self._note(node, atom, name, place)
        # A bias is a score as well; what else the call reads does not have the axis.
        for other in node.all_input_nodes:
            if other is not factors[0] and self.carries(other, atom):
                self._makes(other, atom)
        return True

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        forms = traits_of(node).products
        made = forms(node, lambda operand: len(self.axes.dims(operand))) if forms is not None else []
        places = sorted({place for form in made for place in (form.value, form.weight)})
        return [a for a in (node.args[p] for p in places) if isinstance(a, fx.Node)]

    def _parameter(self, node: fx.Node) -> fx.Node | None:
        """The matrix that a factor is, but for transposes and conversions."""
        while self.axes.vanish.get(node.name) is Vanish.MOVED and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        param = self.program.param(node)
        named = param is not None and param.kind != "constant" and len(param.type.shape) == 2
        return node if named else None

    def _note(self, node: fx.Node, atom: Axis, name: str, place: int) -> None:
        self.made.setdefault(node.name, set()).add(atom)
        self.routers.setdefault(atom, {})[name] = place

    def _check_readers(self, atom: Axis) -> None:
        """A matrix that makes scores makes nothing else: the mask is put on all of its products."""
        for name in self.routers[atom]:
            start = self.program.placeholder_of[name]
            stack = [] if start.name in self.made else [start]
            while stack:
                node = stack.pop()
                for user in node.users:
                    if self.axes.vanish.get(user.name) is Vanish.MOVED:
                        stack.append(user)
                    elif atom not in self.made.get(user.name, ()):
                        self.freezes.add(
                            atom, f"what scores the axis is read in another way at {_at(user)}", at=user.name
                        )

    def choose(self, ranking: Ranking, losing: Atoms) -> None:
        """Freeze what a comparison would not leave alone; ``losing``: the atoms whose removed entries lose in it."""
        for atom in dict.fromkeys(atoms(ranking.over)):
            if atom not in losing:
                self.freezes.add(atom, ranking.reason, at=ranking.node.name)
        if ranking.count and any(self.freezes.of(a) is None for a in atoms(ranking.over)):
            self._count(ranking)

    def _count(self, ranking: Ranking) -> None:
        left = self._open(ranking.operand, frozenset(atoms(ranking.over)), ranking.node)
        if isinstance(left, fx.Node):
            reason = f"how many candidates a choice leaves is not known after {_at(left)}"
            self.freezes.add(ranking.over, reason, at=left.name)
        elif _has_concat(ranking.over):
            self.freezes.add(ranking.over, ranking.reason, at=ranking.node.name)
        else:
            self.choices.append(Choice(ranking.node.name, ranking.over, ranking.count, left.only, left.fewer))

    def _open(self, node: fx.Node, over: Atoms, reader: fx.Node) -> _Open | fx.Node:
        """Which candidates a value leaves when ``reader`` reads it; the call where that is lost."""
        if self.writes.between(node, reader):
            return node
        if node.name in self.made or node.op == "placeholder":
            return _Open()
        row = traits_of(node)
        first = node.args[0]
        assert isinstance(first, fx.Node)
        if getattr(node.target, "__name__", "") == "getitem":
            source, numbers = self.of_choice(node)
            return node if source is None or numbers else self._joined(node, [source], over, _Open())
        if row.low is Low.FILLED:
            value: Any = node.args[2]
            closed = self._survivors(node.args[1]) if is_number(value) and value <= 0 else None
            return self._joined(node, [first], over, closed)
        if row.low is Low.SCATTERED and node.args[3] == -math.inf:
            dims = self.axes.dims(node.args[2])  # type: ignore[arg-type]
            return self._joined(node, [first], over, _Open(fewer=dims[node.args[1]].size))  # type: ignore[index]
        carrying = [n for n in node.all_input_nodes if any(self.carries(n, a) for a in over)]
        summed = row.low in (Low.SUM, Low.DIFFERENCE, Low.REDUCED)
        scaled = row.low is Low.SCALED and len(carrying) == 1
        if summed or scaled or row.keeps_order or self.axes.vanish.get(node.name) is Vanish.MOVED:
            return self._joined(node, carrying, over, _Open())
        return node

    def _joined(self, node: fx.Node, sources: list[fx.Node], over: Atoms, mine: _Open | None) -> _Open | fx.Node:
        if mine is None:
            return node
        for source in sources:
            other = self._open(source, over, node)
            if isinstance(other, fx.Node):
                return other
            mine = mine.also(other)
        return mine

    def _survivors(self, mask: Any) -> _Open | None:
        """What is left by a mask that is true but for a few indices, which numbers name: ``~scatter(zeros, i, 1)``."""
        inverted = False
        while isinstance(mask, fx.Node) and traits_of(mask).low is not Low.SCATTERED:
            if traits_of(mask).inverts:
                inverted = not inverted
            elif self.axes.vanish.get(mask.name) is not Vanish.MOVED:
                return None
            mask = mask.args[0]
        if not isinstance(mask, fx.Node) or not inverted or not is_number(mask.args[3]) or mask.args[3] == 0:
            return None
        target, dim, index = mask.args[:3]
        named = self.axes.numbers.get((index.name, 0)) if isinstance(index, fx.Node) else None
        empty = isinstance(target, fx.Node) and self.axes.vanish.get(target.name) is Vanish.ALWAYS
        if not empty or named is None or not isinstance(index, fx.Node):
            return None
        count = self.axes.dims(index)[dim].size  # type: ignore[index]
        if count == named.size:
            return _Open()
        return _Open({named: count}) if isinstance(named, Axis) else None


def is_number(value: Any) -> bool:
    """Whether an argument is a number and no tensor."""
    return isinstance(value, int | float)


def _has_concat(dim: Dim) -> bool:
    solved = resolve(dim)
    parts = solved.factors if isinstance(solved, Product) else ()
    return isinstance(solved, Concat) or any(_has_concat(p) for p in parts)


def _at(node: fx.Node) -> str:
    return f"%{node.name} = {op_name(node)}"
