"""Adapters of stacked weights: ``W[e] + scale * B[e] A[e]`` as one batched product, with the factors laid end to end.

A is ``(experts * rank, in)``, B is ``(out, rank * experts)``; the weight is ``(experts, out, in)``, or turned.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from shear_passes.analysis.lora_maps import Map, Maps, is_conversion
from shear_passes.ops.registry import op_name


def stacked(maps: Maps, node: fx.Node) -> tuple[Map, fx.Node, fx.Node, float] | None:
    """The base, A, B and the scale where ``node`` is the adapted weight; None for anything else."""
    if op_name(node) != "aten.baddbmm" or not node.kwargs.keys() <= {"alpha"}:
        return None
    args: Any = node.args
    weight, left, right = _unmoved(args[0]), _plain(maps, args[1]), _plain(maps, args[2])
    if not maps.parameter(weight):
        return None
    experts, rank = maps.shape(left)[0], maps.shape(left)[2]
    turned = _swapped(left) is not None
    columns, rows = (_swapped(left), _swapped(right)) if turned else (right, left)
    a = _laid_out(maps, columns, (experts, rank))
    b = _laid_out(maps, _rolled(rows), (-1, rank, experts))
    if a is None or b is None:
        return None
    base = Map(weight, "experts", weight, weight, turned=turned, inside=frozenset([node]))
    scale: Any = node.kwargs.get("alpha", 1.0)
    return base, a, b, float(scale)


def _unmoved(node: fx.Node) -> fx.Node:
    """A parameter seen through what PEFT does to swap it: detached, or set to itself."""
    while op_name(node) == "aten.detach" or (
        op_name(node) == "aten.set_.source_Tensor" and node.args[0] is node.args[1]
    ):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _plain(maps: Maps, node: fx.Node) -> fx.Node:
    while is_conversion(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _swapped(node: fx.Node) -> fx.Node | None:
    """What ``node`` is with its last two dims exchanged."""
    args: Any = node.args
    found: fx.Node | None = args[0] if op_name(node) == "aten.transpose.int" else None
    return found if found is not None and {a % 3 for a in args[1:3]} == {1, 2} else None


def _rolled(node: fx.Node | None) -> fx.Node | None:
    """What ``node`` is with its last dim in front."""
    if node is None or op_name(node) != "aten.permute":
        return None
    args: Any = node.args
    found: fx.Node = args[0]
    return found if list(args[1]) == [2, 0, 1] else None


def _laid_out(maps: Maps, node: fx.Node | None, sizes: tuple[int, ...]) -> fx.Node | None:
    """The matrix that ``node`` lays out with these leading sizes, -1 for any; the last dim of A stays as it is."""
    if node is None or op_name(node) not in ("aten.reshape", "aten.view"):
        return None
    source = node.args[0]
    shape = maps.shape(node)
    fits = all(wanted in (-1, size) for wanted, size in zip(sizes, shape, strict=False))
    if not fits or not isinstance(source, fx.Node) or not maps.parameter(source) or len(maps.shape(source)) != 2:
        return None
    kept = maps.shape(source)[1] == shape[2] if len(sizes) == 2 else maps.shape(source)[0] == shape[0]
    return source if kept else None
