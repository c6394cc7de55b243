"""Elementwise operators: broadcasting is their whole typing rule, and the ``pointwise`` tag of the op says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shear_ir.axes import ONE, Dim, Dims
from shear_passes.rules.registry import Entry, Site, Vanish

_PRODUCTS = {"mul", "mul_", "multiply", "__and__", "bitwise_and", "logical_and"}
_SUMS = {"add", "add_", "sub", "sub_", "rsub", "__or__", "bitwise_or", "logical_or", "maximum", "minimum"}
_FIRST = {"div", "div_", "divide", "pow", "fmod", "where", "ldexp", "floor_divide"}
_ZERO_TO_ZERO = {
    "abs", "alias", "asin", "asinh", "atan", "ceil", "clone", "copy", "detach", "elu", "erf", "expm1", "floor",
    "gelu", "gelu_", "hardswish", "leaky_relu", "log1p", "mish", "neg", "neg_", "prelu", "relu", "relu6",
    "relu_", "round", "sgn", "sign", "silu", "silu_", "sin", "sinh", "softsign", "sqrt", "square", "tan", "tanh",
    "to", "trunc", "_to_copy",
}  # fmt: skip


_UNTAGGED = {
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "where", "masked_fill", "masked_fill_", "type_as",
    "multiply", "subtract", "divide", "true_divide", "negative", "absolute", "square", "clip", "relu6", "selu",
    "rsub", "maximum", "minimum", "fmod", "remainder", "floor_divide", "logical_and", "logical_or", "isnan", "isinf",
    "isfinite", "nan_to_num", "softplus", "hardtanh", "clamp", "clamp_", "float_power", "ldexp", "greater",
    "less", "not_equal", "greater_equal", "less_equal", "log_sigmoid", "prelu", "rrelu", "celu", "silu",
}  # fmt: skip
"""Elementwise by their definition, though the composite ops among them carry no tag."""


def broadcast(site: Site, operands: Sequence[Dims]) -> Dims:
    """Dims of the broadcast of ``operands``, aligned from the right; a dim of size 1 says nothing about the others."""
    rank = max((len(dims) for dims in operands), default=0)
    out: list[Dim] = [ONE] * rank
    for dims in operands:
        for place, dim in enumerate(dims, start=rank - len(dims)):
            if dim.size == 1:
                continue
            if out[place] is ONE:
                out[place] = dim
            else:
                site.equate(out[place], dim)
    return tuple(out)


def pointwise(site: Site, *args: Any, **kwargs: Any) -> Dims:
    """``y[i] = f(x1[i], ..., xn[i])`` after broadcasting."""
    return broadcast(site, [a for a in (*args, *kwargs.values()) if is_dims(a)])


def is_dims(value: Any) -> bool:
    """Whether a rule's argument is a tensor's dims rather than a number or a list of numbers."""
    return isinstance(value, DimsTuple)


class DimsTuple(tuple):  # type: ignore[type-arg]  # a tuple of Dim, told apart from tuples of numbers
    """The dims of one tensor argument."""

    __slots__ = ()


def pointwise_entry(op: Any) -> Entry | None:
    """A row for any op that its tag calls pointwise; None for the others."""
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return None
    name = op.overloadpacket.__name__
    if torch.Tag.pointwise not in op.tags and name not in _UNTAGGED:
        return None
    if name in _PRODUCTS:
        return Entry(pointwise, Vanish.ANY)
    if name in _SUMS:
        return Entry(pointwise, Vanish.ALL)
    if name in _FIRST:
        return Entry(pointwise, Vanish.FIRST if name != "where" else Vanish.NEVER)
    return Entry(pointwise, Vanish.FIRST if name in _ZERO_TO_ZERO else Vanish.NEVER)
