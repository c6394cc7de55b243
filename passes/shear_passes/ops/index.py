"""Access by computed positions: gather, index, index_select, index_put, scatter, one_hot, take_along_dim.

Where the positions are known to be numbers of the indices of a dim, as those of a topk over the scores of experts are,
the dim that they are looked up in is that dim. Numbers never name what was removed, and count what is left anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from shear_ir.axes import ONE, Dim, Dims, axis, concat
from shear_passes.ops.pointwise import broadcast
from shear_passes.ops.registry import Results, Site, Vanish, resize, rule, wrap
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import Low, Reduces, Sign, traits

aten = torch.ops.aten

_CHOSEN = "indices of the axis are chosen by value"


def _look_up(site: Site, dim: Dim, positions: Any) -> bool:
    """``dim`` is the one whose indices are numbered by ``positions``, or frozen where they number nothing known."""
    named = site.named_by(positions)
    if named is None:
        site.freeze([dim], _CHOSEN)
    else:
        site.equate(dim, named)
    return named is not None


def _take_numbers(site: Site) -> None:
    """What is looked up are numbers itself: they keep their meaning."""
    named = site.named_by(site.node.args[0])
    if named is not None:
        site.name(named)


traits("gather take_along_dim", picks=True, along=True)
traits("index index_select", picks=True, along=True, chooses=True, leads=True)
traits("scatter", low=Low.SCATTERED)
traits("one_hot", reduces=Reduces.SHARE, sign=Sign.NOT_NEGATIVE)


@rule(aten.gather.default, aten.take_along_dim.default, vanish=Vanish.FIRST)
def gather(site: Site, x: Dims, *args: Any, **_: Any) -> Dims | Results:
    """``y[..., i, ...] = x[..., index[..., i, ...], ...]``: the other dims are walked together."""
    dim, index = args[:2] if isinstance(args[0], int) else (args[1], args[0])
    if dim is None:
        return site.barrier("take_along_dim of a flattened tensor")
    place = wrap(dim, len(x))
    _look_up(site, x[place], _second(site.node))
    _take_numbers(site)
    _walk_together(site, x, index, skip=place)
    return tuple(index)


def _second(node: fx.Node) -> Any:
    """The positions, which stand before or after the dim."""
    return next((a for a in (*node.args[1:3], node.kwargs.get("index")) if isinstance(a, fx.Node)), None)


def _walk_together(site: Site, x: Dims, index: Dims, skip: int) -> None:
    for place, (mine, other) in enumerate(zip(x, index, strict=True)):
        if place == skip:
            continue
        if mine.size == other.size:
            site.equate(mine, other)
        else:
            site.freeze([mine, other], "only a part of the axis is gathered")


@rule(
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_.src, aten.scatter_.value,
    aten.scatter_add_.default, aten.scatter.reduce, aten.scatter_reduce.two,
)  # fmt: skip
def scatter(site: Site, x: Dims, dim: int, index: Dims, source: Any, *_: Any, **__: Any) -> Dims:
    """``x[..., index[..., i, ...], ...] = source[..., i, ...]``: what no number names stays as it is."""
    place = wrap(dim, len(x))
    if _look_up(site, x[place], site.node.args[2]):
        site.vanish = Vanish.NUMBERED
    site.freeze([index[place]], _CHOSEN)
    _walk_together(site, x, index, skip=place)
    if isinstance(source, tuple):
        site.freeze([source[place]], _CHOSEN)
        _walk_together(site, source, index, skip=place)
    return x


@rule(aten.index.Tensor, vanish=Vanish.FIRST)
def index(site: Site, x: Dims, indices: Sequence[Dims | None]) -> Dims:
    """``x[i, :, j]``: indexed dims give way to the broadcast of the index tensors."""
    return _indexed(site, x, indices, site.shape)


def _indexed(site: Site, x: Dims, indices: Sequence[Dims | None], shape: Sequence[int]) -> Dims:
    used = [(place, i) for place, i in enumerate(indices) if i is not None]
    for place, _ in used:
        if place < len(x):
            _look_up(site, x[place], site.node.args[1][place])  # type: ignore[index]
    _take_numbers(site)
    if any(len(i) > 1 for _, i in used) and len(x) - len(used) + max(len(i) for _, i in used) != len(shape):
        return _by_mask(site, x, shape)
    found = broadcast(site, [i for _, i in used])
    rest = [dim for place, dim in enumerate(x) if place >= len(indices) or indices[place] is None]
    places = [place for place, _ in used]
    together = places == list(range(places[0], places[0] + len(places)))
    at = sum(1 for p in range(places[0]) if indices[p] is None) if together else 0
    out: list[Dim] = [*rest[:at], *found, *rest[at:]]
    if tuple(d.size for d in out) != tuple(shape):
        return _by_mask(site, x, shape)
    return tuple(out)


def _by_mask(site: Site, x: Dims, shape: Sequence[int]) -> Dims:
    out = tuple(axis(size) for size in shape)
    site.freeze((*x, *out), "a mask chooses entries by value")
    return out


@rule(aten.index_select.default, vanish=Vanish.FIRST)
def index_select(site: Site, x: Dims, dim: int, chosen: Dims) -> Dims:
    """``y[..., i, ...] = x[..., chosen[i], ...]``."""
    place = wrap(dim, len(x))
    _look_up(site, x[place], site.node.args[2])
    _take_numbers(site)
    return (*x[:place], *chosen, *x[place + 1 :])


@rule(aten.index_put.default, aten.index_put_.default)
def index_put(site: Site, x: Dims, indices: Sequence[Dims | None], values: Dims, *_: Any) -> Dims:
    """``x[i] = values``, broadcast over the indexed positions."""
    used = [i for i in indices if i is not None]
    site.freeze([x[p] for p, i in enumerate(indices) if i is not None and p < len(x)], _CHOSEN)
    if len(used) != 1 or len(used[0]) != 1 or indices[0] is None:
        site.freeze((*x, *values, *(dim for index in used for dim in index)), _CHOSEN)
        return x
    broadcast(site, [(*used[0], *x[1:]), values])
    site.freeze(used[0], "entries are written one by one")
    return x


@rule(
    aten.index_add.default, aten.index_add_.default, aten.index_copy.default, aten.index_copy_.default,
    aten.index_reduce.default,
)  # fmt: skip
def index_add(site: Site, x: Dims, dim: int, index: Dims, source: Dims, *_: Any, **__: Any) -> Dims:
    """``x[..., index[i], ...] += source[..., i, ...]``, or ``=``: the other dims are walked together."""
    place = wrap(dim, len(x))
    site.freeze((x[place], *index), _CHOSEN)
    for at, (mine, other) in enumerate(zip(x, source, strict=True)):
        site.equate(index[0] if at == place and index else mine, other)
    return x


@rule(aten.index_fill.int_Scalar, aten.index_fill_.int_Scalar, aten.index_fill.int_Tensor, aten.index_fill_.int_Tensor)
def index_fill(site: Site, x: Dims, dim: int, index: Dims, *_: Any) -> Dims:
    """``x[..., index[i], ...] = value``."""
    site.freeze((x[dim], *index), _CHOSEN)
    return x


@rule(aten.one_hot.default)
def one_hot(site: Site, x: Dims, *_: Any) -> Dims:
    """``y[..., c] = (x[...] == c)``: a class for each index that x numbers, and perhaps one that never occurs."""
    named, count = site.named_by(site.node.args[0]), site.shape[-1]
    if named is not None and count - named.size in (0, 1):
        site.vanish = Vanish.NUMBERED
        return (*x, concat([named, *([ONE] * (count - named.size))]))
    classes = axis(count)
    site.freeze([classes, *([] if named is None else [named])], "classes are counted by value")
    return (*x, classes)


@resize(aten.one_hot.default)
def resize_one_hot(change: Resizing) -> None:
    """As many classes as there are."""
    if change.changed(change.out[-1]):
        change.set(1, change.size(change.out[-1]))


@rule(aten.histc.default, aten.bincount.default)
def histogram(site: Site, x: Dims, *args: Any, **options: Any) -> Dims:
    """How many entries fall into each bin: one for each index that x numbers."""
    named = site.named_by(site.node.args[0])
    site.freeze(x, "entries are counted by value")
    if named is not None and _a_bin_each(site, named.size, args, options):
        site.vanish = Vanish.NUMBERED
        return (named,)
    bins = site.fresh()
    site.freeze([*bins, *([] if named is None else [named])], "entries are counted by value")
    return bins


def _a_bin_each(site: Site, size: int, args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether bin i counts the entries that are i, for every number below ``size``."""
    asked = (size, 0, size - 1) if site.node.target is aten.histc.default else (None, size)
    return site.shape == (size,) and args == asked and not options


@resize(aten.histc.default)
def resize_histogram(change: Resizing) -> None:
    """As many bins as there are numbers."""
    if change.changed(change.out[0]):
        change.set(1, change.size(change.out[0]))
        change.set(3, change.size(change.out[0]) - 1)


@resize(aten.bincount.default)
def resize_bincount(change: Resizing) -> None:
    """As many bins as there are numbers."""
    if change.changed(change.out[0]):
        change.set(2, change.size(change.out[0]))


@rule(aten.bucketize.Tensor, aten.searchsorted.Tensor)
def bucketize(site: Site, x: Dims, boundaries: Dims, *_: Any, **__: Any) -> Dims:
    """The number of the interval each entry falls into."""
    values, table = (x, boundaries) if site.node.target is aten.bucketize.Tensor else (boundaries, x)
    site.freeze(table, "a table of boundaries")
    return values


@rule(aten.tril.default, aten.triu.default)
def triangle(site: Site, x: Dims, *_: Any) -> Dims:
    """Rows and columns are compared by number."""
    site.freeze(x[-2:], "rows and columns are compared by number")
    return x
