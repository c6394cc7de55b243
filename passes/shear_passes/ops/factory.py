"""Tensors made from sizes: a constant fill follows its axis, a sequence keeps the entries of the kept indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shear_ir.axes import Dims
from shear_passes.ops.registry import Site, Vanish, resize, rule
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import traits

aten = torch.ops.aten

_FILLS = (aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format)
_NEW = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)


traits("full full_like fill", fills=1)
traits("new_full", fills=2)
traits("scalar_tensor", fills=0)
traits("ones new_ones ones_like", ones=True)


@rule(*_FILLS)
def fill(site: Site, *_: Any, **__: Any) -> Dims:
    """The same value everywhere."""
    _zeros(site, site.node.args[1:2])
    return site.fresh()


@resize(*_FILLS)
def resize_fill(change: Resizing) -> None:
    """Sizes follow the dims of the result."""
    change.sizes(0)


@rule(*_NEW)
def new_fill(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """The same value everywhere, in the dtype of ``x``."""
    _zeros(site, site.node.args[2:3])
    return site.fresh()


@resize(*_NEW)
def resize_new_fill(change: Resizing) -> None:
    """Sizes follow the dims of the result."""
    change.sizes(1)


@rule(
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor,
)  # fmt: skip
def like(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """The same value everywhere, in the shape of ``x``."""
    _zeros(site, site.node.args[1:2])
    site.named_by(site.node.args[0])
    return x


def _zeros(site: Site, value: Sequence[Any]) -> None:
    """The result is zero everywhere if the operator or the value it is given says so."""
    name = site.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name in ("zeros", "new_zeros", "zeros_like", "zero_") or (("full" in name or "fill" in name) and value == (0,)):
        site.vanish = Vanish.ALWAYS


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default)
def sequence(site: Site, *_: Any, **__: Any) -> Dims:
    """Entry i is a function of i: after pruning, the entries of the kept indices."""
    return site.fresh()


@resize(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default)
def resize_sequence(change: Resizing) -> None:
    """The sequence is made at its old size and the kept entries are taken from it."""
    if change.changed(change.out[0]):
        change.take(0)


@rule(aten.scalar_tensor.default)
def scalar(site: Site, *_: Any, **__: Any) -> Dims:
    """A number."""
    return ()


@rule(
    aten.rand.default, aten.randn.default, aten.eye.default, aten.eye.m, aten.randint.default, aten.randint.low,
    aten.randperm.default, aten.tril_indices.default, aten.triu_indices.default,
)  # fmt: skip
def other(site: Site, *_: Any, **__: Any) -> Dims:
    """Random numbers and identity matrices depend on both indices."""
    out = site.fresh()
    site.freeze(out, "entries that depend on the whole shape")
    return out


@rule(aten.rand_like.default, aten.randn_like.default, aten.bernoulli.default, aten.bernoulli.p)
def random_like(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """Random numbers are drawn one after the other: which one an index gets depends on all before it."""
    site.freeze(x, "random numbers are drawn in order")
    return x
