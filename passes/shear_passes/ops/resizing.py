"""Shape constants follow the axes: what a resize function sees and may do to a call after indices are removed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shear_ir.axes import Dim, Dims, Mask

aten = torch.ops.aten


@dataclass
class Resizing:
    """One call of the new graph whose constants may need to follow.

    ``node``: the call, already copied. ``outs``: the dims of its results before the cut. ``size``: the size of a dim
    after the cut; ``kept``: which of its indices stay; ``dtype``: that of the results.
    """

    node: fx.Node
    graph: fx.Graph
    outs: list[Dims]
    argument_dims: Callable[[int], Dims]
    size: Callable[[Dim], int]
    kept: Callable[[Dim], Mask]
    constant: Callable[[Tensor], fx.Node]
    result: fx.Node
    dtype: torch.dtype

    @property
    def out(self) -> Dims:
        """Dims of the only result."""
        return self.outs[0]

    def dims(self, place: int) -> Dims:
        """Dims, before the cut, of the tensor argument at ``place``."""
        return self.argument_dims(place)

    def changed(self, dim: Dim) -> bool:
        """Whether the dim loses indices."""
        return self.size(dim) != dim.size

    def set(self, place: int | str, value: Any) -> None:
        """Replace one argument, by position (added at the end if the call left it out) or by keyword."""
        if isinstance(place, str):
            self.node.kwargs = {**self.node.kwargs, place: value}
        else:
            args = list(self.node.args)
            args[place : place + 1] = [value]
            self.node.args = tuple(args)

    def sizes(self, place: int, first: int = 0) -> None:
        """Rewrite the list of sizes at ``place``; entry i is the size of dim ``first + i`` of the result."""
        sizes = list(self.node.args[place])  # type: ignore[arg-type]
        for at, size in enumerate(sizes):
            dim = self.out[first + at]
            if isinstance(size, int) and size != -1 and self.changed(dim):
                sizes[at] = self.size(dim)
            elif isinstance(size, fx.Node) and self.changed(dim):
                sizes[at] = self.scaled(size, self.size(dim), dim.size)
        self.set(place, sizes)

    def scaled(self, size: fx.Node, after: int, before: int) -> fx.Node:
        """A size computed from the input, such as batch x heads, with its constant factor after the cut."""
        with self.graph.inserting_before(self.node):
            product = self.graph.call_function(operator.mul, (size, after))
            return self.graph.call_function(operator.floordiv, (product, before))

    def call(self, target: Any, args: tuple[Any, ...]) -> None:
        """Replace the call by another one with the same results."""
        self.node.target = target
        self.node.args = args
        self.node.kwargs = {}

    def after(self, target: Any, *args: Any) -> None:
        """Put a call after this one; its result stands for the result from here on."""
        with self.graph.inserting_after(self.result):
            added = self.graph.call_function(target, (self.result, *args))
        added.meta = dict(self.node.meta)
        self.result = added

    def take(self, dim: int) -> None:
        """Keep only the entries of the kept indices along ``dim`` of the result."""
        indices = torch.from_numpy(self.kept(self.out[dim]).nonzero()[0])
        self.after(aten.index_select.default, dim, self.constant(indices))
