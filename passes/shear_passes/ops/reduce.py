"""Reductions: a sum does not miss a zero, a mean misses it by a known factor, the others hold their axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shear_ir.axes import ONE, Dim, Dims, axis
from shear_passes.ops.registry import Need, Results, Site, Vanish, resize, rule, wrap
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import Low, Reduces, Sign, traits

aten = torch.ops.aten

_RANKED = "entries are ranked along the axis"


def _places(x: Dims, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(len(x)))
    return [wrap(d, len(x)) for d in ([dims] if isinstance(dims, int) else dims)]


def _rest(x: Dims, places: Sequence[int], keepdim: bool) -> Dims:
    out: list[Dim] = []
    for place, dim in enumerate(x):
        if place not in places:
            out.append(dim)
        elif keepdim:
            out.append(ONE)
    return tuple(out)


traits("sum", reduces=Reduces.SUM, low=Low.REDUCED, sign=Sign.FIRST)
traits("nansum", reduces=Reduces.SUM)
traits("cumsum", reduces=Reduces.SUM, along=True, cumulates=True)
traits("mean", reduces=Reduces.MEAN, low=Low.REDUCED, sign=Sign.FIRST)
traits("linalg_vector_norm norm linalg_norm", reduces=Reduces.NORM)
traits("var std", reduces=Reduces.SPREAD)
traits("amax amin max min median nanmedian mode kthvalue sort topk cummax cummin", picks=True)
traits("cummax cummin", along=True)


@rule(
    aten.sum.default, aten.sum.dim_IntList, aten.nansum.default, aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
)  # fmt: skip
def total(site: Site, x: Dims, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    """``y = sum over dims``: exact over kept indices when the removed ones were zero."""
    places = _places(x, dims)
    rest = _rest(x, places, keepdim)
    site.contract([x[p] for p in places], [(0, rest)])
    return rest


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.linalg_norm.default)
def vector_norm(
    site: Site, x: Dims, order: Any = 2, dims: Any = None, keepdim: bool = False, *_: Any, **__: Any
) -> Dims:
    """``y = (sum |x|^p)^(1/p)``, with p finite and positive; other orders hold the axis."""
    places = _places(x, dims)
    rest = _rest(x, places, keepdim)
    if site.node.target is aten.linalg_norm.default:
        order = 2 if order is None else order if len(places) == 1 else "that of a matrix"
    if isinstance(order, int | float) and 0 < order < float("inf"):
        site.contract([x[p] for p in places], [(0, rest)])
    else:
        site.freeze([x[p] for p in places], "a norm of this order")
    return rest


@rule(aten.mean.default, aten.mean.dim)
def mean(site: Site, x: Dims, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    """``y = sum over dims / their size``: after removing zeros, too large by the ratio of the sizes."""
    places = _places(x, dims)
    rest = _rest(x, places, keepdim)
    site.contract([x[p] for p in places], [(0, rest)], mean=True)
    return rest


@resize(aten.mean.default, aten.mean.dim)
def resize_mean(change: Resizing) -> None:
    """The mean over kept indices, scaled to be the mean over kept and zeroed ones."""
    x = change.dims(0)
    places = _places(x, change.node.args[1] if len(change.node.args) > 1 else None)
    factor = 1.0
    for place in places:
        factor *= change.size(x[place]) / x[place].size
    if factor != 1.0:
        change.after(aten.mul.Tensor, factor)


@rule(
    aten.amax.default, aten.amin.default, aten.any.dim, aten.any.dims, aten.any.default, aten.all.dim,
    aten.all.default, aten.all.dims, vanish=Vanish.FIRST,
)  # fmt: skip
def extreme(site: Site, x: Dims, dims: Any = None, keepdim: bool = False) -> Dims:
    """The largest or smallest entry: a zero can be it, and of zeros it is zero."""
    places = _places(x, dims)
    site.freeze([x[p] for p in places], "an extreme is taken over the axis")
    return _rest(x, places, keepdim)


@rule(aten.max.default, aten.min.default, aten.argmin.default, aten.prod.default, aten.prod.dim_int)
def whole(site: Site, x: Dims, dim: int | None = None, keepdim: bool = False, **_: Any) -> Dims:
    """The largest entry or its number, or the product."""
    if site.node.target is aten.prod.dim_int:
        site.vanish = Vanish.FIRST
    places = _places(x, dim)
    site.freeze([x[p] for p in places], "a reduction that sees zeros")
    return _rest(x, places, keepdim)


@rule(aten.argmax.default)
def place_of_largest(site: Site, x: Dims, dim: int | None = None, keepdim: bool = False) -> Dims:
    """The number of the largest entry."""
    if dim is None:
        return whole(site, x, dim, keepdim)
    site.rank(0, x[dim], Need.LOSING, "a reduction that sees zeros", count=1)
    site.name(x[dim])
    return _rest(x, _places(x, dim), keepdim)


@rule(aten.max.dim, vanish=Vanish.FIRST)
def largest_and_place(site: Site, x: Dims, dim: int = -1, keepdim: bool = False) -> Results:
    """The largest entry and its number."""
    site.rank(0, x[dim], Need.LOSING, "an extreme is taken over the axis", count=1)
    site.name(x[dim], result=1)
    rest = _rest(x, _places(x, dim), keepdim)
    return [rest, rest]


@rule(aten.min.dim, aten.median.dim, aten.mode.default)
def extreme_and_place(site: Site, x: Dims, dim: int = -1, keepdim: bool = False) -> Results:
    """The largest entry and its number."""
    site.freeze([x[dim]], "an extreme is taken over the axis")
    rest = _rest(x, _places(x, dim), keepdim)
    return [rest, rest]


@rule(aten.aminmax.default, vanish=Vanish.FIRST)
def both_extremes(site: Site, x: Dims, *, dim: int | None = None, keepdim: bool = False) -> Results:
    """The smallest and the largest entry."""
    out = extreme(site, x, dim, keepdim)
    return [out, out]


@rule(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim, vanish=Vanish.FIRST)
def variance(site: Site, x: Dims, dims: Any = None, *rest: Any, correction: Any = 1, keepdim: bool = False) -> Dims:
    """Spread around the mean, which moves when zeros go; zeros have none."""
    places = _places(x, dims)
    site.freeze([x[p] for p in places], "a variance runs over the axis")
    return _rest(x, places, keepdim or len(site.shape) == len(x))


@rule(
    aten.var_mean.correction, aten.var_mean.dim, aten.std_mean.correction, aten.std_mean.dim, vanish=Vanish.FIRST
)  # fmt: skip
def variance_and_mean(site: Site, x: Dims, dims: Any = None, *_: Any, **__: Any) -> Results:
    """Spread and mean together."""
    places = _places(x, dims)
    site.freeze([x[p] for p in places], "a variance runs over the axis")
    out = _rest(x, places, len(site.shapes[0]) == len(x))
    return [out, out]


@rule(aten.cumsum.default)
def running_sum(site: Site, x: Dims, dim: int, **_: Any) -> Dims:
    """Entry i is the sum of all up to it: where one of them is zero, it is equal to the entry before."""
    site.rank(0, x[dim], Need.NOTHING, "a running total along the axis")
    return x


@rule(aten.cumprod.default, aten.logcumsumexp.default)
def running(site: Site, x: Dims, dim: int, **_: Any) -> Dims:
    """Entry i depends on all before it."""
    if site.node.target is aten.cumprod.default:
        site.vanish = Vanish.FIRST
    site.freeze([x[dim]], "a running total along the axis")
    return x


@rule(aten.cummax.default, aten.cummin.default)
def running_extreme(site: Site, x: Dims, dim: int) -> Results:
    """The largest entry so far and its number."""
    site.freeze([x[dim]], "a running extreme along the axis")
    return [x, x]


@rule(aten.diff.default, vanish=Vanish.FIRST)
def difference(site: Site, x: Dims, n: int = 1, dim: int = -1, *_: Any) -> Dims:
    """Entry i depends on its neighbour."""
    place = wrap(dim, len(x))
    out = axis(site.shape[place])
    site.freeze([x[place], out], "a difference along the axis")
    return (*x[:place], out, *x[place + 1 :])


@rule(aten.logsumexp.default)
def logsumexp(site: Site, x: Dims, dims: Any, keepdim: bool = False) -> Dims:
    """``log sum exp(x)``: exp(0) = 1 counts."""
    places = _places(x, dims)
    site.freeze([x[p] for p in places], "a log-sum-exp over the axis")
    return _rest(x, places, keepdim)


@rule(aten.topk.default)
def topk(site: Site, x: Dims, count: int, dim: int = -1, largest: bool = True, *_: Any, **__: Any) -> Results:
    """The ``count`` largest entries, and their numbers, which are those of kept entries where removed ones lose."""
    place = wrap(dim, len(x))
    out = axis(site.shape[place])
    site.freeze([out], _RANKED)
    if largest and isinstance(count, int):
        site.rank(0, x[place], Need.LOSING, _RANKED, count)
    else:
        site.freeze([x[place]], _RANKED)
    site.name(x[place], result=1)
    dims = (*x[:place], out, *x[place + 1 :])
    return [dims, dims]


@rule(aten.sort.default, aten.sort.stable)
def ranked(site: Site, x: Dims, *args: Any, dim: int = -1, stable: Any = None, **_: Any) -> Results:
    """All entries in order and where each stood; numbers without those of removed indices keep their order."""
    place = wrap(args[0] if args and site.node.target is aten.sort.default else dim, len(x))
    out = axis(site.shape[place])
    site.freeze([x[place], out], _RANKED)
    named = site.named_by(site.node.args[0])
    if named is not None:
        site.name(named)
    site.name(x[place], result=1)
    dims = (*x[:place], out, *x[place + 1 :])
    return [dims, dims]


@rule(aten.argsort.default, aten.argsort.stable)
def order(site: Site, x: Dims, *args: Any, dim: int = -1, **_: Any) -> Dims:
    """The numbers of the entries in order."""
    place = wrap(args[0] if args else dim, len(x))
    site.freeze([x[place]], _RANKED)
    site.named_by(site.node.args[0])
    site.name(x[place])
    return x
