"""What operators make of scores that are minus infinity at removed indices: the laws beside those of zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from shear_ir.axes import ONE, Axis, Dims, atoms
from shear_passes.analysis.infer_axes import Axes
from shear_passes.analysis.scores import Atoms, RouterScores, is_number
from shear_passes.ops.registry import Need, Ranking, Vanish
from shear_passes.ops.traits import Low, Sign, traits_of

FactsByNode = Mapping[str, Atoms]
"""By node: the atoms at whose removed indices the value is as the state says."""

_NONE: Atoms = frozenset()


@dataclass(frozen=True, eq=False)
class Losing:
    """``aligned(operand, out, state)`` and ``moved(node, out, state)`` are those of the walk that finds zeros.

    ``low``: values that are minus infinity at removed indices; ``repeated``: that are equal to the entry before.
    """

    axes: Axes
    scores: RouterScores
    zero: FactsByNode
    low: dict[str, Atoms]
    repeated: dict[str, Atoms]
    aligned: Callable[[fx.Node, Mapping[Axis, int], FactsByNode], Atoms]
    moved: Callable[[fx.Node, Mapping[Axis, int], FactsByNode], Atoms]

    def see(self, node: fx.Node, out: Mapping[Axis, int]) -> None:
        """Note the states of a value; ``out``: in how many of its dims each atom is."""
        made = self.scores.made_at(node)
        floats = all(t.dtype.is_floating_point for t in self.scores.program.types.get(node.name, ()))
        self.low[node.name] = (self._low(node, out) if floats else _NONE) | made
        self.repeated[node.name] = self._repeated(node, out)

    def _low(self, node: fx.Node, out: Mapping[Axis, int]) -> Atoms:
        if node.op != "call_function" or node.name in self.axes.barriers:
            return _NONE
        row, args = traits_of(node), node.args
        if self.axes.vanish.get(node.name) is Vanish.MOVED:
            return self.moved(node, out, self.low)
        if row.fills is not None and args[row.fills : row.fills + 1] == (-math.inf,):
            return frozenset(out)
        first = args[0] if args and isinstance(args[0], fx.Node) else None
        if first is None:
            return _NONE
        mine = self.aligned(first, out, self.low)
        match row.low:
            case Low.FILLED:
                return mine if args[2] == -math.inf else _NONE
            case Low.SUM if not node.kwargs:
                return mine | self._of_operand(args[1], out)
            case Low.DIFFERENCE if not node.kwargs:
                return mine - self._of_operand(args[1], out)
            case Low.SCALED:
                return mine if is_number(args[1]) and args[1] > 0 else _NONE  # type: ignore[operator]
            case Low.REDUCED:
                return frozenset(a for a in self.low.get(first.name, _NONE) if self._uncontracted(node, a))
            case Low.SCATTERED if self.axes.vanish.get(node.name) is Vanish.NUMBERED:
                return mine & self._numbered(node)
            case Low.LOG_SHARES:
                return self._over(node, first, mine)
        return _NONE

    def _of_operand(self, operand: Any, out: Mapping[Axis, int]) -> Atoms:
        return self.aligned(operand, out, self.low) if isinstance(operand, fx.Node) else _NONE

    def _uncontracted(self, node: fx.Node, atom: Axis) -> bool:
        """Whether the atom is in the result of a sum as often as in what is summed."""
        first = node.args[0]
        assert isinstance(first, fx.Node)
        before, after = (sum(atom in set(atoms(d)) for d in self.axes.dims(n)) for n in (first, node))
        return before == after

    def _over(self, node: fx.Node, first: fx.Node, mine: Atoms) -> Atoms:
        """``mine`` along the dim that a softmax runs over: elsewhere a whole row may be minus infinity."""
        return mine & frozenset(atoms(self.axes.dims(first)[node.args[1]]))  # type: ignore[index]

    def _numbered(self, node: fx.Node) -> Atoms:
        """The atoms of the dim that the numbers read by a call are about."""
        return frozenset(a for n in node.all_input_nodes for a in atoms(self.axes.numbers.get((n.name, 0), ONE)))

    def _repeated(self, node: fx.Node, out: Mapping[Axis, int]) -> Atoms:
        if len(self.axes.dims(node)) != 1 or node.op != "call_function":
            return _NONE
        if self.axes.vanish.get(node.name) is Vanish.MOVED:
            return self.moved(node, out, self.repeated)
        if not traits_of(node).cumulates:
            return _NONE
        first: Any = node.args[0]
        return self._over(node, first, self.zero.get(first.name, _NONE))

    def zeros(self, node: fx.Node, out: Mapping[Axis, int]) -> Atoms:
        """The atoms at which a value is zero because of scores or of numbers, beside those its own law says."""
        law = traits_of(node).low
        first = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(first, fx.Node) or node.name in self.axes.barriers:
            return _NONE
        if law is Low.SHARES:
            return self._over(node, first, self.aligned(first, out, self.low))
        if law is Low.ZERO:
            return self.aligned(first, out, self.low)
        if law is Low.FILLED:
            return self.aligned(first, out, self.zero) if is_number(node.args[2]) and node.args[2] == 0 else _NONE
        if self.axes.vanish.get(node.name) is not Vanish.NUMBERED:
            return _NONE
        named = self._numbered(node) & out.keys()
        return named & self.aligned(first, out, self.zero) if law is Low.SCATTERED else frozenset(named)

    def losing(self, ranking: Ranking) -> Atoms:
        """The atoms whose removed entries change nothing in a comparison."""
        operand, dims = ranking.operand, self.axes.dims(ranking.operand)
        once = frozenset(a for a in atoms(ranking.over) if _count(dims, a) == 1)
        low, zero = (state.get(operand.name, _NONE) & once for state in (self.low, self.zero))
        if ranking.need is Need.WEIGHTLESS:
            return low
        if ranking.need is Need.NOTHING:
            return zero
        if ranking.need is Need.REPEATED:
            return self.repeated.get(operand.name, _NONE) & once
        return low | (zero if self._not_negative(operand, ranking.node) else _NONE)

    def _not_negative(self, value: Any, reader: fx.Node) -> bool:
        """Whether no entry of a value is below zero, so that a removed one, which is zero, is larger than none."""
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return is_number(value) and bool(value >= 0)
        if self.scores.writes.between(value, reader):
            return False
        sign, args = traits_of(value).sign, value.args
        if sign is Sign.NOT_NEGATIVE or self.axes.vanish.get(value.name) is Vanish.ALWAYS:
            return True
        if getattr(value.target, "__name__", "") == "getitem":
            source, numbers = self.scores.of_choice(value)
            return source is not None and not numbers and self._not_negative(source, value)
        if sign is Sign.BOTH:
            return not value.kwargs and all(self._not_negative(v, value) for v in (args[0], args[-1]))
        passes = sign is Sign.FIRST or self.axes.vanish.get(value.name) is Vanish.MOVED
        return passes and self._not_negative(args[0], value)


def _count(dims: Dims, atom: Axis) -> int:
    return sum(atom in set(atoms(d)) for d in dims)
