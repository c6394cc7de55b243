"""The maps by a parameter that a graph may spell in several ways: linear, Conv1D, embedding, convolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import fx

from shear_ir.program import Program
from shear_passes.ops.registry import op_name

MapKind = Literal["linear", "embedding", "conv", "experts"]

_CONVERSIONS = ("aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy")
VIEWS = ("aten.view", "aten.reshape")
"""Calls that lay the entries of a value out anew, in the same order."""

_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_UNIT = (1, 0, 1)
"""Stride, padding and dilation of a map of channels."""


@dataclass(frozen=True, eq=False)
class Map:
    """``node`` is the image of ``x`` under a parameter; x of an embedding are the indices.

    Stacked experts are the weight itself: node, x and weight are one.

    ``turned``: the parameter lies the other way: ``(in, out)`` for a linear map, ``(out, vocab)`` for an embedding.
    ``options``: what else the call says, the same for a base and its A. ``inside``: the calls that make it.
    """

    node: fx.Node
    kind: MapKind
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    turned: bool = False
    options: tuple[Any, ...] = ()
    pointwise: bool = True
    inside: frozenset[fx.Node] = field(default=frozenset(), repr=False)

    @staticmethod
    def of_composed(node: fx.Node) -> Map:
        """The base of a composed operator's call."""
        kind = composed_kind(node)
        assert kind is not None
        args: Any = node.args
        if kind == "experts":
            return Map(node, kind, args[0], args[0], turned=bool(node.kwargs.get("transposed")))
        first, second, *rest = args
        weight, x = (first, second) if kind == "embedding" else (second, first)
        bias = None if kind == "embedding" or not rest else rest.pop(0)
        turned = bool(node.kwargs.get("transposed"))
        return Map(node, kind, x, weight, bias, turned, tuple(rest))


def composed_kind(node: fx.Node) -> MapKind | None:
    """The kind of base that a call of a composed operator ``lora.*`` has; None for any other call."""
    library, _, name = op_name(node).partition(".")
    return next((kind for kind in get_args(MapKind) if library == "lora" and kind == name), None)


def is_conversion(node: fx.Node) -> bool:
    """Whether a call only changes the dtype."""
    return op_name(node) in _CONVERSIONS


class Maps:
    """Looks for maps in one program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def of(self, node: fx.Node) -> Map | None:
        """The map that makes ``node`` from something by a parameter; None when nothing of the kind does."""
        name = op_name(node)
        if name == "aten.linear":
            return self._made(node, "linear", node.args[0], node.args[1], *node.args[2:3])
        if name in ("aten.matmul", "aten.mm"):
            return self._turned(node, "linear", node.args[0], node.args[1])
        if name == "aten.addmm" and not node.kwargs:
            return self._made(node, "linear", node.args[1], node.args[2], node.args[0], turned=True)
        if name in VIEWS:
            return self._flattened(node)
        if name == "aten.embedding":
            return self._table(node)
        return self._convolution(node) if name in _CONVOLUTIONS else None

    def plain(self, node: fx.Node) -> fx.Node:
        """The value that ``node`` is, seen through conversions to the dtype it has."""
        while is_conversion(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if self.program.type(source) != self.program.type(node):
                break
            node = source
        return node

    def parameter(self, node: Any) -> bool:
        """Whether a node is a parameter of the model."""
        param = self.program.param(node) if isinstance(node, fx.Node) else None
        return param is not None and param.kind == "parameter"

    def transposed(self, node: Any) -> fx.Node | None:
        """The matrix that ``node`` is the transpose of; None when it is not one."""
        if not isinstance(node, fx.Node) or len(self.shape(node)) != 2:
            return None
        args: Any = node.args
        name = op_name(node)
        swap = name in ("aten.t", "aten.numpy_T")
        swap |= name == "aten.transpose.int" and {a % 2 for a in args[1:3]} == {0, 1}
        swap |= name == "aten.permute" and [a % 2 for a in args[1]] == [1, 0]
        return args[0] if swap else None

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The sizes of a value; empty for anything but a tensor."""
        kind = self.program.type(node)
        return () if kind is None else kind.shape

    def _made(self, node: fx.Node, kind: MapKind, x: Any, weight: Any, bias: Any = None, **more: Any) -> Map | None:
        if not self.parameter(weight) or not (bias is None or self.parameter(bias)) or not isinstance(x, fx.Node):
            return None
        inside = more.pop("inside", frozenset()) | {node}
        return Map(node, kind, self.plain(x), weight, bias, inside=inside, **more)

    def _turned(self, node: fx.Node, kind: MapKind, x: Any, matrix: Any) -> Map | None:
        """A product with a parameter, or with the transpose of one: then it lies as in ``linear``."""
        if not isinstance(matrix, fx.Node) or len(self.shape(matrix)) != 2:
            return None
        source = self.transposed(matrix)
        return self._made(node, kind, x, matrix if source is None else source, turned=source is None)

    def _table(self, node: fx.Node) -> Map | None:
        table, indices, *rest = node.args
        if len(rest) > 1 or node.kwargs:
            return None
        source = self.transposed(table)
        options = (-1,) if not rest else (rest[0],)
        weight = table if source is None else source
        return self._made(node, "embedding", indices, weight, turned=source is not None, options=options)

    def _flattened(self, node: fx.Node) -> Map | None:
        """Conv1D: a product of rows laid end to end, and the rows laid out as they were."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or op_name(source) not in ("aten.addmm", "aten.mm"):
            return None
        made = self.of(source)
        if made is None or op_name(made.x) not in VIEWS:
            return None
        x = made.x.args[0]
        if not isinstance(x, fx.Node) or self.shape(x)[:-1] != self.shape(node)[:-1]:
            return None
        if (self.shape(x)[-1], self.shape(node)[-1]) != (self.shape(made.x)[-1], self.shape(source)[-1]):
            return None
        inside = made.inside | {node}
        return Map(node, "linear", self.plain(x), made.weight, made.bias, made.turned, inside=inside)

    def _convolution(self, node: fx.Node) -> Map | None:
        args: Any = (*node.args, None)[: max(3, len(node.args))]
        x, weight, bias, *rest = args
        if node.kwargs or not isinstance(weight, fx.Node):
            return None
        spatial = len(self.shape(weight)) - 2
        given = [*rest, *([1], [0], [1])[len(rest) :]] if len(rest) < 3 else rest
        if given[3:] not in ([], [1]):  # groups couple the rank with the channels
            return None
        options = tuple([tuple(v) * (spatial if len(v) == 1 else 1) for v in given[:3]])
        unit = all(set(v) == {one} for v, one in zip(options, _UNIT, strict=True))
        dot = unit and set(self.shape(weight)[2:]) <= {1}
        return self._made(node, "conv", x, weight, bias, options=options, pointwise=dot)
