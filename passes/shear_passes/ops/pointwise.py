"""Elementwise operators: broadcasting is their whole typing rule, and the ``pointwise`` tag of the op says so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from shear_ir.axes import ONE, Dim, Dims, axis, concat
from shear_passes.ops.elementwise import LAWS, UNTAGGED
from shear_passes.ops.registry import Entry, Site, Vanish, rule, wrap
from shear_passes.ops.traits import row_name

aten = torch.ops.aten


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
    name = row_name(op)
    if torch.Tag.pointwise not in op.tags and name not in UNTAGGED:
        return None
    return Entry(pointwise, LAWS.get(name, Vanish.NEVER))


@cache
def is_pointwise(op: Any) -> bool:
    """Whether the tag of an op, or its definition, calls it elementwise."""
    return pointwise_entry(op) is not None


@rule(
    aten.clamp.default, aten.clamp_.default, aten.clip.default, aten.clamp_min.default, aten.clamp_min_.default,
    aten.hardtanh.default, aten.hardtanh_.default,
)  # fmt: skip
def clamp(site: Site, x: Dims, low: Any = None, high: Any = None) -> Dims:
    """``y[i] = min(max(x[i], low), high)``: zero stays zero when it lies between the bounds."""
    if site.node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = -1 if low is None else low, 1 if high is None else high
    numbers = all(isinstance(bound, int | float | None) for bound in (low, high))
    site.vanish = Vanish.FIRST if numbers and (low or 0) <= 0 <= (high or 0) else Vanish.NEVER
    named = site.numbers.get(site.node.args[0])  # type: ignore[arg-type]
    if named is not None and numbers and (low or 0) <= 0 and (high is None or high >= named.size - 1):
        site.named_by(site.node.args[0])
        site.name(named)  # no index is moved by bounds that all of them keep
    return x


@rule(aten.ge.Scalar, aten.gt.Scalar)
def at_least(site: Site, x: Dims, bound: Any) -> Dims:
    """``y[i] = x[i] >= bound``: of indices never true where the bound is above all of them, however few are left."""
    named = site.numbers.get(site.node.args[0])  # type: ignore[arg-type]
    if named is not None and isinstance(bound, int | float) and bound >= named.size:
        site.named_by(site.node.args[0])
    return x


@rule(aten.prelu.default, vanish=Vanish.FIRST)
def prelu(site: Site, x: Dims, slope: Dims) -> Dims:
    """``y = x`` where positive, ``slope * x`` elsewhere: one slope, or one for each index of dim 1."""
    if slope and slope[0].size > 1:
        site.equate(x[1], slope[0])
    return x


@rule(aten.glu.default, vanish=Vanish.FIRST)
def glu(site: Site, x: Dims, dim: int = -1) -> Dims:
    """``y = a * sigmoid(b)`` for the halves a and b of a dim: they lose the same indices."""
    place = wrap(dim, len(x))
    half = axis(site.shape[place])
    site.equate(x[place], concat([half, half]))
    return (*x[:place], half, *x[place + 1 :])
