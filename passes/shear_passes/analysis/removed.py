"""What removed entries are where they are not zero: an epsilon, one half, something positive.

Asked from a divisor back to what made it, and no further than needed: most values are zero there, or nobody divides
by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shear_ir.axes import Axis, atoms
from shear_ir.program import Program
from shear_passes.analysis.infer_axes import Axes
from shear_passes.analysis.scores import Atoms, Writes
from shear_passes.ops.domain import bounds
from shear_passes.ops.pointwise import is_pointwise
from shear_passes.ops.ranges import ANY, NOT_NEGATIVE, POSITIVE, SHARE, ZERO, Range
from shear_passes.ops.registry import Vanish
from shear_passes.ops.traits import Reduces, Traits, traits_of

_DEEPEST = 100


class Removed:
    """The range of a value at entries at which an index of an atom is removed, or, for no atom, at every entry.

    ``zero``: the atoms at which values are zero now; ``low``: at which they are minus infinity; ``copies(node)``: the
    atoms that count copies in a call that makes such.
    """

    def __init__(
        self, program: Program, axes: Axes, writes: Writes, zero: Mapping[str, Atoms], low: Mapping[str, Atoms],
        copies: Callable[[fx.Node], Atoms],
    ) -> None:  # fmt: skip
        self.program, self.axes, self.writes = program, axes, writes
        self.zero, self.low, self.copies = zero, low, copies
        self._found: dict[tuple[str, Axis | None], Range] = {}
        self._deep = 0

    def read(self, operand: fx.Node, reader: fx.Node, atom: Axis | None) -> Range:
        """What ``reader`` reads."""
        if atom in self.zero.get(operand.name, ()):
            return ZERO
        if atom in self.low.get(operand.name, ()):
            return Range(-math.inf, -math.inf)
        if self._deep > _DEEPEST or self.writes.between(operand, reader):
            return ANY
        if (operand.name, atom) not in self._found:
            self._deep += 1
            kinds = self.program.types.get(operand.name, ())
            plain = kinds and not kinds[0].dtype.is_complex
            self._found[operand.name, atom] = self._made(operand, atom).held(kinds[0].dtype) if plain else ANY
            self._deep -= 1
        return self._found[operand.name, atom]

    def known(self, node: fx.Node, atom: Axis | None) -> dict[fx.Node, Range]:
        """The ranges of all operands where an index of the atom is removed in the result."""
        return {operand: self._aligned(operand, node, atom) for operand in node.all_input_nodes}

    def _aligned(self, operand: fx.Node, node: fx.Node, atom: Axis | None) -> Range:
        """Entries of an operand with fewer dims of the atom may be kept ones."""
        same = atom is not None and self._count(operand, atom) == self._count(node, atom)
        return self.read(operand, node, atom if same else None)

    def _count(self, node: fx.Node, atom: Axis) -> int:
        return sum(atom in set(atoms(dim)) for dim in self.axes.of_node.get(node.name, [()])[0])

    def _made(self, node: fx.Node, atom: Axis | None) -> Range:
        if node.op == "placeholder":
            return self._constant(node)
        if node.op != "call_function" or node.name in self.axes.barriers:
            return ANY
        row = traits_of(node)
        if self.axes.vanish.get(node.name) is Vanish.ALWAYS:
            return ZERO
        if self.axes.vanish.get(node.name) is Vanish.MOVED and (not row.mixes or False in node.args[2:3]):
            return self._moved(node, atom)
        if row.bounds is not None or (is_pointwise(node.target) and row.fills is None):
            return bounds(node, self.known(node, atom))
        return self._filled(row, node) if row.ones or row.fills is not None else self._reduced(row, node, atom)

    def _constant(self, node: fx.Node) -> Range:
        tensor = self.program.constants.get(self.program.of_placeholder.get(node.name, ""))
        if tensor is None or tensor.is_meta or tensor.is_complex() or not tensor.numel():
            return ANY
        numbers = tensor.to(torch.float64)
        ends = float(numbers.min()), float(numbers.max())
        return ANY if any(math.isnan(end) for end in ends) else Range(*ends, bool((numbers == 0).any()))

    def _moved(self, node: fx.Node, atom: Axis | None) -> Range:
        first = node.args[0]
        sources = [s for s in (first if isinstance(first, (list, tuple)) else [first]) if isinstance(s, fx.Node)]
        if getattr(node.target, "__name__", "") == "getitem" and (node.args[1] != 0 and traits_of(sources[0]).picks):
            return NOT_NEGATIVE
        if atom is not None and atom not in self.copies(node):
            carrying = [s for s in sources if self._carries(s, atom)]
            sources, atom = (carrying, atom) if carrying else (sources, None)
        else:
            atom = None
        found = [self._converted(s, node, atom) for s in sources] + [ZERO] * traits_of(node).pads
        made = found[0]
        for other in found[1:]:
            made |= other
        return made

    def _carries(self, node: fx.Node, atom: Axis) -> bool:
        return any(atom in set(atoms(d)) for dims in self.axes.of_node.get(node.name, []) for d in dims)

    def _converted(self, source: fx.Node, node: fx.Node, atom: Axis | None) -> Range:
        """Numbers that are cut to whole ones may be zero."""
        before, after = (self.program.types[n.name][0].dtype for n in (source, node))
        whole = before.is_floating_point and not after.is_floating_point
        return ANY if whole or after is torch.bool or before.is_complex else self.read(source, node, atom)

    def _filled(self, row: Traits, node: fx.Node) -> Range:
        place = row.fills
        value: Any = 1 if place is None else node.args[place] if place < len(node.args) else None
        return Range(value, value) if isinstance(value, int | float) and not math.isnan(value) else ANY

    def _reduced(self, row: Traits, node: fx.Node, atom: Axis | None) -> Range:
        first = node.args[0] if node.args else None
        if row.reduces is Reduces.SHARE:
            return SHARE
        if row.reduces is Reduces.SPREAD:
            return NOT_NEGATIVE
        if not isinstance(first, fx.Node):
            return ANY
        operand = self._aligned(first, node, None if row.along and self._is_along(first, node, atom) else atom)
        if row.picks or (row.reduces is Reduces.MEAN and not operand.low < 0 < operand.high):
            return operand
        if row.reduces is Reduces.SUM:
            return operand.many()
        if row.reduces is Reduces.NORM:
            return NOT_NEGATIVE if operand.zero else POSITIVE
        return Range(operand.low, operand.high) if row.reduces is Reduces.MEAN else ANY

    def _is_along(self, first: fx.Node, node: fx.Node, atom: Axis | None) -> bool:
        dim = node.args[1]
        return not isinstance(dim, int) or atom in set(atoms(self.axes.dims(first)[dim]))
