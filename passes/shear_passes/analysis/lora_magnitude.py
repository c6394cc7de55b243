"""DoRA's gain: what each row of an adapted weight is scaled by, ``m / |W + scale * B A|``, as graphs spell it."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from shear_passes.analysis.lora_maps import VIEWS, Map, Maps, is_conversion
from shear_passes.ops.registry import op_name

_NORMS = ("aten.linalg_norm", "aten.linalg_vector_norm")


class Gains:
    """Looks for gains in one program."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def magnitude(self, gain: fx.Node, base: Map, a: fx.Node, b: fx.Node, scale: float) -> fx.Node | None:
        """The parameter m that ``gain`` makes the norm of each row of ``base`` with this adapter; None if it does not.

        A gain lies along the last dim of what it scales, that of a convolution along dim 1.
        """
        out = self.maps.shape(b)[0]
        spatial = len(self.maps.shape(base.weight)) - 2
        if self.maps.shape(gain)[1 - len(self.maps.shape(gain)) :] not in ((out, *(1 for _ in range(spatial))), (out,)):
            return None
        if math.prod(self.maps.shape(gain)) != out:
            return None
        quotient = self._laid_out(gain)
        if op_name(quotient) != "aten.div.Tensor" or not self.maps.parameter(quotient.args[0]):
            return None
        magnitude, norm = quotient.args
        assert isinstance(magnitude, fx.Node)
        if not isinstance(norm, fx.Node) or math.prod(self.maps.shape(norm)) != out:
            return None
        rows = self._normed(self._laid_out(norm))
        return magnitude if rows is not None and self._is_adapted(rows, base, a, b, scale) else None

    def _laid_out(self, node: fx.Node) -> fx.Node:
        """The vector that ``node`` only converts, detaches or lays out, all its other dims being 1."""
        while is_conversion(node) or op_name(node) in (*VIEWS, "aten.detach", "aten.transpose.int"):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return node

    def _normed(self, node: fx.Node) -> fx.Node | None:
        """The weight whose rows' Euclidean norms ``node`` is."""
        if op_name(node) not in _NORMS or len(node.args) < 3 or node.kwargs or node.args[1] not in (None, 2):
            return None
        args: Any = node.args
        weight, _, dims = args[:3]
        found: fx.Node = weight
        return found if list(dims) == list(range(1, len(self.maps.shape(found)))) else None

    def _is_adapted(self, node: fx.Node, base: Map, a: fx.Node, b: fx.Node, scale: float) -> bool:
        """Whether ``node`` is ``W + scale * B A``, rows first."""
        if op_name(node) != "aten.add.Tensor" or node.kwargs:
            return False
        weight, change = map(self._detached, node.args)
        if weight is None or change is None or op_name(change) != "aten.mul.Tensor":
            return False
        number = next((x for x in change.args if isinstance(x, int | float)), None)
        delta = self._detached(next((x for x in change.args if isinstance(x, fx.Node)), None))
        turned = base.turned != (base.kind == "embedding")
        rows = self._detached(self.maps.transposed(weight)) if turned else weight
        return number == scale and rows is base.weight and delta is not None and self._product(delta, base) == (a, b)

    def _detached(self, node: object) -> fx.Node | None:
        while isinstance(node, fx.Node) and (is_conversion(node) or op_name(node) == "aten.detach"):
            node = node.args[0]
        return node if isinstance(node, fx.Node) else None

    def _product(self, node: fx.Node, base: Map) -> tuple[fx.Node, fx.Node] | None:
        """A and B where ``node`` is their product."""
        if base.kind == "conv":
            return self._kernels(node, base)
        turned = self._detached(self.maps.transposed(node))
        outer = self.maps.of(turned) if turned is not None else None
        if outer is None or outer.bias is not None or outer.turned:
            return None
        source = self.maps.transposed(outer.x)
        if source is not None:
            return source, outer.weight
        inner = self.maps.of(outer.x)
        of_identity = inner is not None and not inner.turned and op_name(inner.x) == "aten.eye"
        return (inner.weight, outer.weight) if inner is not None and of_identity else None

    def _kernels(self, node: fx.Node, base: Map) -> tuple[fx.Node, fx.Node] | None:
        product = node.args[0] if op_name(node) in VIEWS else None
        if not isinstance(product, fx.Node) or op_name(product) != "aten.mm":
            return None
        b, a = (x.args[0] for x in product.args if isinstance(x, fx.Node) and op_name(x) in VIEWS)
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        out, rank = self.maps.shape(b)[:2]
        shapes = [self.maps.shape(x) for x in (*product.all_input_nodes, node)]
        wanted = [(out, rank), (rank, shapes[1][-1]), self.maps.shape(base.weight)]
        return (a, b) if shapes == wanted else None
