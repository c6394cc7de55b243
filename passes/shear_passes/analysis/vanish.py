"""Where a value is zero once units are masked to zero: what makes leaving an index out the same as zeroing it.

A contraction over an axis misses nothing when a removed index goes, provided one of its factors is zero there in the
masked model. Parameters are, by definition of the mask; products keep it, sums need it of every term, and functions
with f(0) != 0 lose it. A contraction that cannot show it freezes its axis. Axes whose indices are chosen by scores are
masked in another way: see ``scores``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from shear_ir.axes import Axis, Dim, Dims, Freeze, Freezes, Hold, atoms
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.losing import Losing
from shear_passes.analysis.poles import Poles
from shear_passes.analysis.removed import Removed
from shear_passes.analysis.scores import Choice, RouterScores, Writes
from shear_passes.ops.registry import Contraction, Vanish, op_name
from shear_passes.ops.traits import traits_of

Atoms = frozenset[Axis]
AtomCounts = dict[Axis, int]

_NOTHING: Atoms = frozenset()


@dataclass(frozen=True, eq=False)
class Zeros:
    """``of_node``: the atoms at whose removed indices a node's value is zero in the masked model, and stays zero.

    ``made``: those at which it was zero before any later call wrote to its memory.
    ``contracted``: the atoms that some operator sums over.
    ``low``: the atoms at whose removed indices a value is minus infinity instead; ``scored``: where the mask puts that.
    ``repeated``: those at which it is that of the index before.
    ``routers``: for each atom whose indices are chosen, names of the tensors that score it with the dim it is in there;
    ``choices``: the choices, each of which needs so many indices to choose from. ``frozen``: the axes that removed
    entries hold, beside those that inference froze.
    """

    of_node: Mapping[str, Atoms]
    made: Mapping[str, Atoms]
    contracted: Atoms
    low: Mapping[str, Atoms] = field(default_factory=dict)
    scored: Mapping[str, Atoms] = field(default_factory=dict)
    repeated: Mapping[str, Atoms] = field(default_factory=dict)
    routers: Mapping[Axis, Mapping[str, int]] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()
    frozen: Mapping[Axis, Freeze] = field(default_factory=dict)


@dataclass(frozen=True)
class FindZeros(Analysis[Zeros]):
    """One walk; what contractions that removed indices would change hold is part of the result."""

    requires = (InferAxes,)

    def run(self, program: Program, analyses: AnalysisManager) -> Zeros:
        """Linear in the number of nodes."""
        return _Walk(program, analyses.get(InferAxes())).run()


class _Walk:
    def __init__(self, program: Program, axes: Axes) -> None:
        self.program = program
        self.axes = axes
        self.made: dict[str, Atoms] = {}
        # As ``made``, after the writes in place that came since.
        self.zero: dict[str, Atoms] = {}
        self.by_call: dict[str, list[Contraction]] = {}
        for contraction in axes.contractions:
            self.by_call.setdefault(contraction.node.name, []).append(contraction)
        # Values that may lie in the same memory, by the first of them.
        self.writes = Writes()
        self.home = self.writes.home
        self.sharing: dict[str, list[str]] = {}
        self._distinct: dict[int, tuple[Axis, ...]] = {}
        self.freezes = Freezes()
        self.scores = RouterScores(program, axes, self.writes, self.freezes)
        self.low: dict[str, Atoms] = {}
        self.losing = Losing(axes, self.scores, self.zero, self.low, {}, self._aligned_in, self._moved)
        removed = Removed(program, axes, self.writes, self.zero, self.low, self._counted_copies)
        self.poles = Poles(axes, removed, self.freezes)

    def run(self) -> Zeros:
        contracted: set[Axis] = set()
        for node in self.program.nodes:
            if node.op == "output":
                continue
            self.zero[node.name] = self.made[node.name] = self._zeros(node)
            self.writes.position[node.name] = len(self.writes.position)
            self._settle(node)
            self.poles.check(node)
            for contraction in self.by_call.get(node.name, ()):
                contracted.update(a for dim in contraction.over for a in atoms(dim))
                self._check(contraction)
            for ranking in self.scores.by_node.get(node.name, ()):
                self.scores.choose(ranking, self.losing.losing(ranking))
            for written in _written(node):
                self._write(node, written)
        scored = {name: frozenset(made) for name, made in self.scores.made.items()}
        return Zeros(
            self.zero, self.made, frozenset(contracted), self.low, scored, self.losing.repeated,
            self.scores.routers, tuple(self.scores.choices), self.freezes.found,
        )  # fmt: skip

    def _zeros(self, node: fx.Node) -> Atoms:
        out = self._out(node)
        if not self.scores.routers:
            self.low[node.name] = self.losing.repeated[node.name] = _NOTHING
            return self._of(node, out)
        self.losing.see(node, out)
        return (self._of(node, out) | self.losing.zeros(node, out)) - self.low[node.name]

    def _settle(self, node: fx.Node) -> None:
        """Note whose memory the value lies in."""
        source = node.args[0] if _shares(self.axes, node) else None
        home = self.home.get(source.name, source.name) if isinstance(source, fx.Node) else node.name
        self.home[node.name] = home
        self.sharing.setdefault(home, []).append(node.name)

    def _write(self, node: fx.Node, written: fx.Node) -> None:
        """What lies in the memory that a call writes to is zero only where what it writes is zero, too."""
        carried = self.carried(self.axes.dims(written)).keys()
        self.writes.note(node, written)
        for state in (self.zero, self.low, self.losing.repeated):
            lost = carried - state[node.name]
            for name in self.sharing[self.home[written.name]] if lost else ():
                state[name] -= lost

    def carried(self, dims: Iterable[Dim]) -> AtomCounts:
        """How many of the dims each atom occurs in."""
        total: AtomCounts = {}
        for dim in dims:
            if id(dim) not in self._distinct:
                self._distinct[id(dim)] = tuple(dict.fromkeys(atoms(dim)))
            for atom in self._distinct[id(dim)]:
                total[atom] = total.get(atom, 0) + 1
        return total

    def _out(self, node: fx.Node) -> AtomCounts:
        """In how many dims of its results each atom is."""
        out: AtomCounts = {}
        for dims in self.axes.of_node.get(node.name, []):
            for atom, count in self.carried(dims).items():
                out[atom] = max(count, out.get(atom, 0))
        return out

    def _of(self, node: fx.Node, out: AtomCounts) -> Atoms:
        results = self.axes.of_node.get(node.name, [])
        if node.op == "placeholder":
            param = self.program.param(node)
            # A constant in the code has no name by which the mask could reach it.
            masked = param is not None and param.kind != "constant"
            return frozenset(self.carried(results[0])) if masked and results else _NOTHING
        law = self.axes.vanish.get(node.name, Vanish.NEVER)
        if node.name in self.axes.barriers:
            return _NOTHING
        if law is Vanish.MOVED:
            return self._moved(node, out, self.zero)
        if law is Vanish.ALWAYS:
            return frozenset(out)
        if law is Vanish.FIRST:
            return self._first(node, out)
        if law is Vanish.ANY:
            return frozenset(a for o in node.all_input_nodes for a in self._aligned(o, out))
        if law is Vanish.ALL:
            return self._all(node, out)
        made = [self._contracted(c, out) for c in self.by_call.get(node.name, ()) if not c.inner]
        return frozenset.intersection(*made) if made else _NOTHING

    def _aligned(self, operand: fx.Node, out: AtomCounts, free: Dims | None = None) -> Atoms:
        """The atoms that vanish in ``operand`` and whose dims in the result all come from it."""
        dims = self.axes.dims(operand) if free is None else free
        mine = self.carried(dims)
        return frozenset(a for a in self.zero.get(operand.name, _NOTHING) if a in out and mine.get(a) == out[a])

    def _aligned_in(self, operand: fx.Node, out: Mapping[Axis, int], state: Mapping[str, Atoms]) -> Atoms:
        mine = self.carried(self.axes.dims(operand))
        return frozenset(a for a in state.get(operand.name, _NOTHING) if a in out and mine.get(a) == out[a])

    def _moved(self, node: fx.Node, out: Mapping[Axis, int], state: Mapping[str, Atoms]) -> Atoms:
        sources = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
        chosen, numbers = self.scores.of_choice(node)
        if chosen is not None:
            # The largest entries; their numbers say nothing of zeros.
            sources = [] if numbers else [chosen]
        found: set[Axis] = set()
        broken: set[Axis] = set()
        for source in sources:
            if not isinstance(source, fx.Node):
                continue
            zero = state.get(source.name, _NOTHING)
            for dims in self.axes.of_node.get(source.name, []):
                carried = set(self.carried(dims))
                found |= carried & zero
                broken |= carried - zero
        stays = frozenset(a for a in found - broken if a in out)
        return stays - self._counted_copies(node) if stays else stays

    def _counted_copies(self, node: fx.Node) -> Atoms:
        """The atoms that turned out to count copies: a copy is not zero for standing at a removed place."""
        source = node.args[0]
        if not traits_of(node).repeats or not isinstance(source, fx.Node):
            return _NOTHING
        before, after = (Counter(a for dim in self.axes.dims(n) for a in atoms(dim)) for n in (source, node))
        return frozenset((after - before).keys())

    def _first(self, node: fx.Node, out: AtomCounts) -> Atoms:
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return _NOTHING
        if traits_of(node).power and not _positive(node.args[1]):
            return _NOTHING
        return self._aligned(first, out)

    def _all(self, node: fx.Node, out: AtomCounts) -> Atoms:
        if any(isinstance(a, int | float) and a != 0 for a in node.args):
            return _NOTHING
        sets = [self._aligned(o, out) for o in node.all_input_nodes]
        return frozenset.intersection(*sets) if sets else _NOTHING

    def _contracted(self, made: Contraction, out: AtomCounts) -> Atoms:
        found = frozenset[Axis]().union(*(self._aligned(o.node, out, o.free) for o in made.operands))
        for addend in made.added:
            found &= self._aligned(addend, out)
        return found

    def _check(self, contraction: Contraction) -> None:
        at = contraction.node.name
        where = f"%{at} = {op_name(contraction.node)}"
        for dim in contraction.over:
            for atom in set(atoms(dim)):
                if not any(atom in self.zero.get(o.node.name, _NOTHING) for o in contraction.operands):
                    self.freezes.add(atom, f"summed over where removed entries need not be zero at {where}", at=at)
                elif contraction.mean:
                    self.freezes.add(atom, f"a mean (RMS normalisation) runs over the axis at {where}", Hold.NORM, at)


def _positive(exponent: Any) -> bool:
    return isinstance(exponent, int | float) and exponent > 0


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that a call writes to, as its schema says."""
    for place, name in _writes(node.target):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(name)
        if isinstance(value, fx.Node):
            yield value


@cache
def _writes(target: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operator writes to."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return ()
    return tuple((place, a.name) for place, a in enumerate(target._schema.arguments) if a.is_write)


@cache
def _returns_a_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _shares(axes: Axes, node: fx.Node) -> bool:
    """Whether a value may lie in the memory of its first argument: a view, a write in place, or a call unknown here."""
    if node.op != "call_function" or not node.args:
        return False
    moved = axes.vanish.get(node.name) is Vanish.MOVED and not traits_of(node).copies
    return _returns_a_view(node.target) or moved or node.name in axes.barriers
