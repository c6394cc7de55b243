"""Taking parts and putting parts together: slice, select, chunk, split, unbind, cat, stack, pad, roll, flip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shear_ir.axes import ONE, Concat, Dim, Dims, axis, concat, product, split
from shear_passes.ops.registry import Results, Site, Vanish, resize, rule, wrap
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import traits

aten = torch.ops.aten


traits("select", leads=True)
traits("cat concat stack flip", copies=True)
traits("pad constant_pad_nd", copies=True, pads=True, fills_in=True)


@rule(aten.slice.Tensor, aten.narrow.default, vanish=Vanish.MOVED)
def slice_(site: Site, x: Dims, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dims:
    """``x[start:end:step]`` of one dim: a part of a Concat, or, with a step, the outer factor of a Product."""
    place = wrap(dim, len(x))
    whole, size = x[place], site.shape[place]
    if size == whole.size:
        return x
    if site.node.target is aten.narrow.default:
        step = 1
    if not isinstance(start, int | None) or not isinstance(step, int):
        return _frozen_part(site, x, place, "a slice that starts where the input says")
    first = _start(start, whole.size)
    part = _part(whole, first, size) if step == 1 else _stride(site, whole, first, size, step)
    if part is None:
        return _frozen_part(site, x, place, "a slice across the structure of the axis")
    return (*x[:place], part, *x[place + 1 :])


def _part(whole: Dim, start: int, size: int) -> Dim | None:
    """The indices ``start`` to ``start + size`` of ``whole`` as a dim of its own."""
    tail = split(whole, start)
    parts = None if tail is None else split(tail[1], size)
    return None if parts is None else parts[0]


def _start(start: int | None, size: int) -> int:
    """Where a slice starts, counted from the front; beyond either end it starts at that end."""
    return min(max(wrap(start or 0, size), 0), size)


def _stride(site: Site, whole: Dim, start: int, size: int, step: int) -> Dim | None:
    if whole.size != size * step or start >= step:
        return None
    outer = axis(size)
    inner = concat([ONE] * step)
    site.equate(whole, product((outer, inner)))
    return outer


def _frozen_part(site: Site, x: Dims, place: int, reason: str) -> Dims:
    part = axis(site.shape[place])
    site.freeze([x[place], part], reason)
    return (*x[:place], part, *x[place + 1 :])


@resize(aten.slice.Tensor)
def resize_slice(change: Resizing) -> None:
    """Bounds move with the parts that lie before them; a stride does not change."""
    args = change.node.args
    place = wrap(args[1] if len(args) > 1 else 0, len(change.out))  # type: ignore[arg-type]
    whole, out = change.dims(0)[place], change.out[place]
    step = args[4] if len(args) > 4 else 1
    if not change.changed(whole) or whole.size == out.size or step != 1:
        return
    start = _start(args[2] if len(args) > 2 else 0, whole.size)  # type: ignore[arg-type]
    before = split(whole, start)
    assert before is not None
    first = change.size(before[0])
    change.set(2, first)
    change.set(3, first + change.size(out))


@resize(aten.narrow.default)
def resize_narrow(change: Resizing) -> None:
    """As for slice, with a length in place of an end."""
    _, dim, start, _ = change.node.args
    place = wrap(dim, len(change.out))  # type: ignore[arg-type]
    whole = change.dims(0)[place]
    if not change.changed(whole):
        return
    before = split(whole, _start(start, whole.size))  # type: ignore[arg-type]
    assert before is not None
    change.set(2, change.size(before[0]))
    change.set(3, change.size(change.out[place]))


@rule(aten.select.int, vanish=Vanish.MOVED)
def select(site: Site, x: Dims, dim: int, index: Any) -> Dims:
    """One index of a dim: it stays, its neighbours can go."""
    place = wrap(dim, len(x))
    whole = x[place]
    rest = (*x[:place], *x[place + 1 :])
    if not isinstance(index, int) or _part(whole, wrap(index, whole.size), 1) is None:
        site.freeze([whole], "one index of the axis is chosen by its number")
    return rest


@resize(aten.select.int)
def resize_select(change: Resizing) -> None:
    """The index moves with what lies before it."""
    _, dim, index = change.node.args
    whole = change.dims(0)[wrap(dim, len(change.dims(0)))]  # type: ignore[arg-type]
    if change.changed(whole):
        before = split(whole, wrap(index, whole.size))  # type: ignore[arg-type]
        assert before is not None
        change.set(2, change.size(before[0]))


@rule(
    aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default,
    aten.tensor_split.sections, aten.tensor_split.indices, aten.unsafe_chunk.default, aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    vanish=Vanish.MOVED,
)  # fmt: skip
def chunk(site: Site, x: Dims, _: Any, dim: int = 0) -> Results:
    """The parts of a Concat, in order."""
    place = wrap(dim, len(x))
    parts = [axis(shape[place]) for shape in site.shapes]
    site.equate(x[place], concat(parts))
    return [(*x[:place], part, *x[place + 1 :]) for part in parts]


@resize(
    aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default,
    aten.tensor_split.sections, aten.tensor_split.indices, aten.unsafe_chunk.default, aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
)  # fmt: skip
def resize_chunk(change: Resizing) -> None:
    """Parts may end up of unlike sizes, so every way to split becomes a split by sizes."""
    dim = change.node.args[2] if len(change.node.args) > 2 else change.node.kwargs.get("dim", 0)
    place = wrap(dim, len(change.dims(0)))  # type: ignore[arg-type]
    if change.changed(change.dims(0)[place]):
        sizes = [change.size(out[place]) for out in change.outs]
        change.call(aten.split_with_sizes.default, (change.node.args[0], sizes, dim))


@rule(aten.unbind.int, vanish=Vanish.MOVED)
def unbind(site: Site, x: Dims, dim: int = 0) -> Results:
    """Every index of a dim becomes a tensor: none of them can go."""
    place = wrap(dim, len(x))
    site.equate(x[place], concat([ONE] * x[place].size))
    return [(*x[:place], *x[place + 1 :]) for _ in site.shapes]


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default, vanish=Vanish.MOVED)
def cat(site: Site, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    """Dims laid end to end along ``dim``, all other dims equal."""
    full = [t for t in tensors if not (len(t) == 1 and t[0].size == 0)] or list(tensors)
    place = wrap(dim, len(full[0]))
    for other in full[1:]:
        for at, (a, b) in enumerate(zip(full[0], other, strict=True)):
            if at != place:
                site.equate(a, b)
    site.join_numbers(site.node.args[0])  # type: ignore[arg-type]
    return (*full[0][:place], concat([t[place] for t in full]), *full[0][place + 1 :])


@rule(aten.stack.default, vanish=Vanish.MOVED)
def stack(site: Site, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    """A new dim that counts the tensors."""
    first = tensors[0]
    for other in tensors[1:]:
        for a, b in zip(first, other, strict=True):
            site.equate(a, b)
    site.join_numbers(site.node.args[0])  # type: ignore[arg-type]
    place = wrap(dim, len(first) + 1)
    return (*first[:place], concat([ONE] * len(tensors)), *first[place:])


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(site: Site, x: Dims, amounts: Sequence[Any], *rest: Any, **_: Any) -> Dims:
    """Constant padding lays fixed indices beside a dim; any other kind copies from it."""
    constant = site.node.target is aten.constant_pad_nd.default or not rest or rest[0] == "constant"
    value = (rest[-1] if rest and not isinstance(rest[-1], str) else 0) or 0
    site.vanish = Vanish.MOVED if constant and value == 0 else Vanish.NEVER
    out = list(x)
    for pair in range(len(amounts) // 2):
        place = len(x) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if before == 0 and after == 0:
            continue
        if constant and all(isinstance(a, int) and a >= 0 for a in (before, after)):
            added = [axis(before) if before else Concat(()), axis(after) if after else Concat(())]
            site.freeze(added, "padding")
            out[place] = concat((added[0], x[place], added[1]))
        else:
            out[place] = axis(site.shape[place])
            site.freeze([x[place], out[place]], "padding by the tensor's own values")
    return tuple(out)


@rule(aten.slice_scatter.default, aten.select_scatter.default, vanish=Vanish.ALL)
def scatter_part(site: Site, x: Dims, source: Dims, dim: int = 0, *_: Any) -> Dims:
    """``x`` with a part of one dim taken from ``source``: the other dims are walked together."""
    place = wrap(dim, len(x))
    rest = (*x[:place], *x[place + 1 :])
    sliced = len(source) == len(x)
    others = (*source[:place], *source[place + 1 :]) if sliced else source
    for mine, other in zip(rest, others, strict=True):
        site.equate(mine, other)
    site.freeze([x[place], *(source[place : place + 1] if sliced else ())], "a part of the axis is replaced")
    return x


@rule(aten.unfold.default, vanish=Vanish.FIRST)
def unfold(site: Site, x: Dims, dim: int, size: int, step: int) -> Dims:
    """Windows along a dim, laid out in a new last one."""
    place = wrap(dim, len(x))
    windows, inside = axis(site.shape[place]), axis(size)
    site.freeze([x[place], windows, inside], "windows run along the axis")
    return (*x[:place], windows, *x[place + 1 :], inside)


@rule(aten.roll.default, vanish=Vanish.MOVED)
def roll(site: Site, x: Dims, shifts: Any, dims: Sequence[int] = ()) -> Dims:
    """Every index moves: where it goes depends on the size."""
    site.freeze([x[d] for d in dims] or x, "the axis is rolled")
    return x


@rule(aten.flip.default, vanish=Vanish.MOVED)
def flip(site: Site, x: Dims, dims: Sequence[int]) -> Dims:
    """Index i becomes n - 1 - i."""
    site.freeze([x[d] for d in dims], "the axis is reversed")
    return x
