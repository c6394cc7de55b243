"""Operators that have no value at removed entries: no factor of zero makes a number of infinity again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from shear_ir.axes import Axis, Freezes, atoms
from shear_passes.analysis.infer_axes import Axes
from shear_passes.analysis.removed import Removed
from shear_passes.ops.domain import conditional, has_value
from shear_passes.ops.pointwise import is_pointwise
from shear_passes.ops.ranges import ZERO
from shear_passes.ops.registry import op_name
from shear_passes.ops.traits import Low, traits_of


class Poles:
    """Freezes the axes at whose removed indices a call is not shown to have a value."""

    def __init__(self, axes: Axes, removed: Removed, freezes: Freezes) -> None:
        self.axes, self.removed, self.freezes = axes, removed, freezes

    def check(self, node: fx.Node) -> None:
        """Operators that have a value everywhere cost nothing."""
        if node.op != "call_function" or node.name in self.axes.barriers:
            return
        row = traits_of(node)
        if row.epsilon is not None:
            self._check_norm(node, row.epsilon)
        elif row.low in (Low.SHARES, Low.LOG_SHARES):
            self._check_softmax(node)
        elif is_pointwise(node.target):
            operands = conditional(node)
            for atom in self._carried(dim for operand in operands for dim in self.axes.dims(operand)):
                self._check(node, operands, atom)

    def _check(self, node: fx.Node, operands: tuple[fx.Node, ...], atom: Axis) -> None:
        known = self.removed.known(node, atom)
        if len(operands) == 1:
            known[operands[0]] = self.removed.read(operands[0], node, atom)
        if not has_value(node, known):
            divided = any(known[operand] == ZERO for operand in operands)
            reason = "removed entries would be divided by" if divided else "removed entries need not have a value"
            self._hold(atom, reason, node)

    def _check_norm(self, node: fx.Node, place: int) -> None:
        """A norm that adds nothing to a variance divides by it; the axes that it runs over are not its concern."""
        epsilon = node.args[place] if place < len(node.args) else node.kwargs.get("eps")
        if epsilon == 0 and isinstance(node.args[0], fx.Node):
            dims = self.axes.dims(node.args[0])
            over = node.args[1] if isinstance(node.args[1], (list, tuple)) else ()
            for atom in self._carried(dims[: len(dims) - len(over)]):
                self.freezes.add(
                    atom, f"removed entries would be divided by at %{node.name} = {op_name(node)}", at=node.name
                )

    def _check_softmax(self, node: fx.Node) -> None:
        """A softmax along another dim finds nothing but minus infinity where an index is not to be chosen."""
        source = node.args[0]
        if isinstance(source, fx.Node):
            low = self.removed.low.get(source.name, frozenset())
            for atom in low - set(atoms(self.axes.dims(source)[node.args[1]])):  # type: ignore[index]
                self.freezes.add(
                    atom, f"removed entries would have no softmax at %{node.name} = {op_name(node)}", at=node.name
                )

    def _hold(self, atom: Axis, reason: str, node: fx.Node) -> None:
        self.freezes.add(atom, f"{reason} at %{node.name} = {op_name(node)}", at=node.name)

    def _carried(self, dims: Iterable[object]) -> dict[Axis, None]:
        return dict.fromkeys(a for dim in dims for a in atoms(dim))  # type: ignore[arg-type]
