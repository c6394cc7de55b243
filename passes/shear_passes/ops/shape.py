"""Views: the same elements in the same order under other dims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from shear_ir.axes import ONE, Dims, axis, concat, product
from shear_passes.ops.registry import Results, Site, Vanish, resize, rule, wrap
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import Asks, Layout, traits

aten = torch.ops.aten


def _swapped(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (wrap(int(str(d)), rank) for d in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


traits("t numpy_T", order=lambda node, rank: list(range(rank))[::-1])
traits("transpose", order=_swapped)
traits("permute", order=lambda node, rank: [wrap(d, rank) for d in node.args[1]])
traits("unsqueeze", leads=True)
traits("reshape reshape_as flatten ravel", layout=Layout.BY_STRIDES)
traits("contiguous", layout=Layout.BY_STRIDES, converts=True)
traits("to type_as alias detach lift_fresh", layout=Layout.SAME, converts=True)
traits("to.dtype_layout", layout=Layout.BY_STRIDES)
traits("clone to_copy lift_fresh_copy", converts=True)
traits("dropout feature_dropout alpha_dropout feature_alpha_dropout", layout=Layout.SAME, drops=True, mixes=True)
traits("set", mixes=True)
traits("sym_size", asks=Asks.SIZE)
traits("sym_numel sym_stride sym_storage_offset", asks=Asks.LAYOUT)


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.ravel.default, vanish=Vanish.MOVED,
)  # fmt: skip
def view(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """Row-major order is kept, so the product of all dims before equals the product after."""
    before, after = tuple(d.size for d in x), site.shape
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    out = site.fresh(after[same:])
    site.equate(product(x[same:]), product(out))
    return (*x[:same], *out)


@rule(aten.view_as.default, aten.reshape_as.default, vanish=Vanish.MOVED)
def view_as(site: Site, x: Dims, other: Dims) -> Dims:
    """A view with the sizes of another tensor, and so with its dims."""
    site.equate(product(x), product(other))
    return tuple(other)


@resize(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def resize_view(change: Resizing) -> None:
    """Sizes follow the dims of the result; a size of -1 or one computed from the input stays as it is."""
    change.sizes(1)


@resize(aten.unflatten.int)
def resize_unflatten(change: Resizing) -> None:
    """As a view, for the dims that one dim was unfolded into."""
    start = wrap(change.node.args[1], len(change.dims(0)))  # type: ignore[arg-type]
    change.sizes(2, first=start)


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, vanish=Vanish.MOVED)
def transpose(site: Site, x: Dims, a: int, b: int) -> Dims:
    """Two dims change places."""
    dims = list(x)
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule(aten.t.default, aten.mT.default, aten.mH.default, aten.adjoint.default, vanish=Vanish.MOVED)
def transposed(site: Site, x: Dims) -> Dims:
    """The last two dims change places."""
    return (*x[:-2], *reversed(x[-2:]))


@rule(aten.numpy_T.default, vanish=Vanish.MOVED)
def reversed_dims(site: Site, x: Dims) -> Dims:
    """All dims in reverse."""
    return tuple(reversed(x))


@rule(aten.permute.default, vanish=Vanish.MOVED)
def permute(site: Site, x: Dims, order: Sequence[int]) -> Dims:
    """Dims in another order."""
    return tuple(x[place] for place in order)


@rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, vanish=Vanish.MOVED)
def movedim(site: Site, x: Dims, source: int | list[int], target: int | list[int]) -> Dims:
    """Some dims move, the others keep their order."""
    sources = [wrap(s, len(x)) for s in ([source] if isinstance(source, int) else source)]
    targets = [wrap(t, len(x)) for t in ([target] if isinstance(target, int) else target)]
    placed = dict(zip(targets, sources, strict=True))
    others = iter(place for place in range(len(x)) if place not in sources)
    return tuple(x[placed[place]] if place in placed else x[next(others)] for place in range(len(x)))


@rule(aten.unsqueeze.default, vanish=Vanish.MOVED)
def unsqueeze(site: Site, x: Dims, dim: int) -> Dims:
    """A dim of size 1 comes in."""
    place = wrap(dim, len(x) + 1)
    return (*x[:place], ONE, *x[place:])


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, vanish=Vanish.MOVED)
def squeeze(site: Site, x: Dims, dim: int | Sequence[int] | None = None) -> Dims:
    """Dims of size 1 go out."""
    gone = _squeezed(x, dim)
    return tuple(d for place, d in enumerate(x) if place not in gone)


def _squeezed(x: Dims, dim: int | Sequence[int] | None) -> list[int]:
    places = range(len(x)) if dim is None else [dim] if isinstance(dim, int) else dim
    asked = {wrap(place, len(x)) for place in places}
    return [place for place, d in enumerate(x) if place in asked and d.size == 1]


@resize(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def resize_squeeze(change: Resizing) -> None:
    """A longer dim does not go out once it has one index left."""
    source, *dim = change.node.args
    gone = _squeezed(change.dims(0), dim[0] if dim else None)  # type: ignore[arg-type]
    change.call(aten.squeeze.dims, (source, gone))


@rule(
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.to.other, aten._to_copy.default, aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default,
    aten.type_as.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default, aten.resolve_conj.default,
    aten.resolve_neg.default, aten.conj.default, aten._conj.default, aten.real.default, aten.imag.default,
    vanish=Vanish.MOVED,
)  # fmt: skip
def identity(site: Site, x: Dims, *_: Any, **__: Any) -> Dims | Results:
    """The same tensor in another dtype, layout or place; dropout in evaluation mode."""
    if tuple(d.size for d in x) != site.shape:
        return site.barrier("an identity that changes the shape")
    return x


@rule(aten.view_as_complex.default, vanish=Vanish.MOVED)
def view_as_complex(site: Site, x: Dims) -> Dims:
    """Real and imaginary parts, side by side in the last dim, become one number."""
    site.equate(x[-1], concat([ONE, ONE]))
    return x[:-1]


@rule(aten.view_as_real.default, vanish=Vanish.MOVED)
def view_as_real(site: Site, x: Dims) -> Dims:
    """One number becomes two, side by side in a new last dim."""
    return (*x, concat([ONE, ONE]))


@rule(aten.diagonal.default)
def diagonal(site: Site, x: Dims, offset: int = 0, first: int = 0, second: int = 1) -> Dims:
    """``y[..., i] = x[..., i, ..., i + offset, ...]``: rows and columns are compared by number."""
    gone = {wrap(first, len(x)), wrap(second, len(x))}
    entries = axis(site.shape[-1])
    site.freeze([entries, *(x[place] for place in gone)], "rows and columns are compared by number")
    return (*(d for place, d in enumerate(x) if place not in gone), entries)


@rule(aten.copy_.default)
def copy_(site: Site, x: Dims, source: Dims, *_: Any) -> Dims:
    """``x[...] = source``, broadcast."""
    for mine, other in zip(reversed(x), reversed(source), strict=False):
        if other.size != 1:
            site.equate(mine, other)
    site.contract([], [(1, source)])
    return x


@rule(aten.set_.source_Tensor, vanish=Vanish.MOVED)
def set_(site: Site, x: Dims, source: Dims) -> Dims | Results:
    """A tensor takes the memory of another; only of itself, as PEFT does to a parameter that it adapts."""
    if site.node.args[0] is not site.node.args[1]:
        return site.barrier("a tensor takes the memory of another")
    return x
