"""Repetition: expand, repeat, repeat_interleave. The axis that counts the copies is a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shear_ir.axes import ONE, Dim, Dims, axis, product
from shear_passes.ops.pointwise import broadcast
from shear_passes.ops.registry import Results, Site, Vanish, resize, rule, wrap
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import traits

aten = torch.ops.aten


traits("expand", leads=True)
traits("expand expand_as broadcast_to repeat tile repeat_interleave", repeats=True)
traits("repeat tile repeat_interleave", copies=True)


@rule(aten.expand.default, aten.broadcast_to.default, vanish=Vanish.MOVED)
def expand(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """A dim of size 1, or one that was not there, becomes a fresh axis of copies."""
    new = len(site.shape) - len(x)
    out: list[Dim] = [axis(size) for size in site.shape]
    for place, dim in enumerate(x, start=new):
        if dim.size == site.shape[place]:
            out[place] = dim
    return tuple(out)


@resize(aten.expand.default, aten.broadcast_to.default)
def resize_expand(change: Resizing) -> None:
    """Sizes follow the dims of the result."""
    change.sizes(1)


@rule(aten.expand_as.default, vanish=Vanish.MOVED)
def expand_as(site: Site, x: Dims, other: Dims) -> Dims:
    """The copies are counted by the dims of another tensor."""
    return broadcast(site, [other, x])


@rule(aten.broadcast_tensors.default)
def broadcast_tensors(site: Site, tensors: Sequence[Dims]) -> Results:
    """Each tensor with the dims of all of them."""
    out = broadcast(site, tensors)
    return [out for _ in tensors]


@rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(site: Site, tensors: Sequence[Dims], *_: Any, indexing: str = "ij") -> Results:
    """Tensor i varies along dim i, and along the other one of the first two with ``indexing="xy"``."""
    out = [t[0] if t else ONE for t in tensors]
    if indexing == "xy":
        out[:2] = reversed(out[:2])
    return [tuple(out) for _ in tensors]


@rule(aten.repeat.default, aten.tile.default, vanish=Vanish.MOVED)
def repeat(site: Site, x: Dims, repeats: Sequence[int]) -> Dims:
    """Copies laid end to end: copies x index."""
    new = len(site.shape) - len(x)
    padded = (*(axis(1) for _ in range(new)), *x)
    return tuple(
        dim if dim.size == size else product((axis(size // dim.size), dim))
        for dim, size in zip(padded, site.shape, strict=True)
    )


@resize(aten.repeat.default, aten.tile.default)
def resize_repeat(change: Resizing) -> None:
    """The number of copies is the size of the result over the size of what is repeated."""
    x, out = change.dims(0), change.out
    new = len(out) - len(x)
    counts = list(change.node.args[1])  # type: ignore[arg-type]
    # A tile may count for the last dims alone.
    for at, place in enumerate(range(len(out) - len(counts), len(out))):
        if isinstance(counts[at], int) and change.changed(out[place]):
            counts[at] = change.size(out[place]) // (change.size(x[place - new]) if place >= new else 1)
    change.set(1, counts)


@rule(aten.repeat_interleave.self_int, vanish=Vanish.MOVED)
def repeat_interleave(site: Site, x: Dims, repeats: int, dim: int | None = None, **_: Any) -> Dims | Results:
    """Copies side by side: index x copies."""
    if dim is None:
        if len(x) != 1:
            return site.barrier("repeat_interleave of a flattened tensor")
        dim = 0
    place = wrap(dim, len(x))
    return (*x[:place], product((x[place], axis(repeats))), *x[place + 1 :])


@resize(aten.repeat_interleave.self_int)
def resize_repeat_interleave(change: Resizing) -> None:
    """As for repeat."""
    x = change.dims(0)
    place = wrap(change.node.args[2] if len(change.node.args) > 2 else 0, len(x))  # type: ignore[arg-type]
    change.set(1, change.size(change.out[place]) // change.size(x[place]))
    if isinstance(change.node.kwargs.get("output_size"), int):
        change.set("output_size", change.size(change.out[place]))
