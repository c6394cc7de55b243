"""Convolution, grouped and depthwise and transposed, and the pooling and resizing of its feature maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from shear_ir.axes import Dim, Dims, axis, product
from shear_passes.ops.pointwise import broadcast
from shear_passes.ops.registry import Results, Site, Vanish, resize, rule
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import Role, WeightedProduct, traits

aten = torch.ops.aten

_CONV = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding,
)  # fmt: skip
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def _products(turned: Callable[[fx.Node], bool], place: int) -> Callable[..., list[WeightedProduct]]:
    """The weight is argument 1; argument ``place`` says in how many groups its channels are.

    A transposed convolution stores the channels that it reads whole, in groups or not.
    """

    def products(node: fx.Node, rank: Callable[[fx.Node], int]) -> list[WeightedProduct]:
        weight = node.args[1]
        groups = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
        if not isinstance(weight, fx.Node) or not isinstance(groups, int) or rank(weight) < 3:
            return []
        dims = (0, 1) if turned(node) else (1, groups)
        return [WeightedProduct(0, 1, 1 - rank(weight), *dims)]

    return products


traits("conv1d conv2d conv3d", products=_products(lambda node: False, 6), role=Role.CONVOLUTION)
traits("lora.conv", products=_products(lambda node: False, 6), role=Role.ADAPTED_CONVOLUTION)
traits(
    "conv_transpose1d conv_transpose2d conv_transpose3d", products=_products(lambda node: True, 6),
    role=Role.CONVOLUTION,
)  # fmt: skip
traits("convolution", products=_products(lambda node: bool(node.args[6]), 8), role=Role.CONVOLUTION)
traits("im2col", pads=True)


@rule(*_CONV)
def conv(
    site: Site, x: Dims, weight: Dims, bias: Dims | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: Any = 1,
) -> Dims:  # fmt: skip
    """``y[n, g*o] = sum_i x[n, g*i] * w[g*o, i]`` at every position; depthwise: as many groups as channels.

    A number of groups that forward takes from its input, as one for each sample, is told by the channels.
    """
    groups = x[-len(weight) + 1].size // weight[1].size
    group = axis(groups)
    site.equate(x[-len(weight) + 1], product((group, weight[1])))
    site.equate(weight[0], product((group, axis(weight[0].size // groups))))
    return _conv(site, x, weight[0], weight[1], weight, bias, groups)


@rule(*_TRANSPOSED)
def conv_transpose(
    site: Site, x: Dims, weight: Dims, bias: Dims | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: Any = 1, dilation: Any = 1,
) -> Dims:  # fmt: skip
    """``y[n, g*o] = sum_i x[n, g*i] * w[g*i, o]`` at every position."""
    groups = site.shape[-len(weight) + 1] // weight[1].size
    group, inner = axis(groups), axis(weight[0].size // groups)
    site.equate(x[-len(weight) + 1], weight[0])
    site.equate(weight[0], product((group, inner)))
    return _conv(site, x, product((group, weight[1])), inner, weight, bias, groups)


@rule(aten.convolution.default)
def convolution(
    site: Site, x: Dims, weight: Dims, bias: Dims | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: Any,
) -> Dims:  # fmt: skip
    """The general form of the above."""
    if transposed:
        return conv_transpose(site, x, weight, bias, groups=groups)
    return conv(site, x, weight, bias, groups=groups)


def _conv(site: Site, x: Dims, channels: Dim, over: Dim, weight: Dims, bias: Dims | None, groups: int) -> Dims:
    if bias is not None:
        site.equate(bias[0], channels)
    rank = len(weight) - 2
    site.freeze(weight[2:], "kernel positions")
    site.freeze(x[-rank:], "positions of a convolution")
    positions = site.fresh(site.shape[-rank:])
    site.freeze(positions, "positions of a convolution")
    lead = x[: -rank - 1]
    of_x = (*lead, channels) if groups > 1 else lead
    site.contract([over, *weight[2:]], [(0, of_x), (1, [channels])], added=[2])
    return (*lead, channels, *positions)


@resize(*_CONV, *_TRANSPOSED, aten.convolution.default)
def resize_conv(change: Resizing) -> None:
    """The number of groups is the channels that come in over the channels that one group reads."""
    general = change.node.target is aten.convolution.default
    place = 8 if general else 6
    old = change.node.args[place] if len(change.node.args) > place else change.node.kwargs.get("groups", 1)
    if old == 1:
        return
    weight, x = change.dims(1), change.dims(0)
    transposed = change.node.target in _TRANSPOSED or (general and change.node.args[6])
    whole = change.out[-len(weight) + 1] if transposed else x[-len(weight) + 1]
    before, after = whole.size // weight[1].size, change.size(whole) // change.size(weight[1])
    if before != after:
        groups = change.scaled(old, after, before) if isinstance(old, fx.Node) else after
        change.set(place if len(change.node.args) > place else "groups", groups)


@rule(
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, vanish=Vanish.FIRST,
)  # fmt: skip
def pool(site: Site, x: Dims, kernel: Sequence[int] | int, *_: Any, **__: Any) -> Dims:
    """A window over the positions of each channel on its own."""
    name = site.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    return _positions(site, x, int(name[-2]))


@rule(
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest3d.vec, aten.upsample_linear1d.vec,
    aten.upsample_trilinear3d.vec, aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
    vanish=Vanish.FIRST,
)  # fmt: skip
def resample(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """Other positions for each channel on its own."""
    name = site.node.target.overloadpacket.__name__.removesuffix("_aa")  # type: ignore[union-attr]
    return _positions(site, x, int(name[-2]))


@rule(
    aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.max_pool1d_with_indices.default,
    aten.max_pool2d_with_indices.default,
)  # fmt: skip
def pool_with_indices(site: Site, x: Dims, *_: Any, **__: Any) -> Results:
    """The largest entry of each window and where it stands."""
    name = site.node.target.overloadpacket.__name__.removesuffix("_with_indices")  # type: ignore[union-attr]
    out = _positions(site, x, int(name[-2]))
    return [out, out]


def _positions(site: Site, x: Dims, rank: int) -> Dims:
    site.freeze(x[-rank:], "positions of a pooling")
    positions = site.fresh(site.shape[-rank:])
    site.freeze(positions, "positions of a pooling")
    return (*x[:-rank], *positions)


@rule(aten.pixel_shuffle.default, vanish=Vanish.MOVED)
def pixel_shuffle(site: Site, x: Dims, factor: int) -> Dims:
    """Channels ``c x factor x factor`` become positions."""
    channels, block = axis(x[-3].size // factor**2), axis(factor**2)
    site.freeze([block], "channels become positions")
    site.equate(x[-3], product((channels, block)))
    positions = site.fresh(site.shape[-2:])
    site.freeze((*x[-2:], *positions), "channels become positions")
    return (*x[:-3], channels, *positions)


@rule(aten.pixel_unshuffle.default, vanish=Vanish.MOVED)
def pixel_unshuffle(site: Site, x: Dims, factor: int) -> Dims:
    """Positions become channels ``c x factor x factor``."""
    block = axis(factor**2)
    positions = site.fresh(site.shape[-2:])
    site.freeze((block, *x[-2:], *positions), "positions become channels")
    return (*x[:-3], product((x[-3], block)), *positions)


@rule(aten.channel_shuffle.default, vanish=Vanish.MOVED)
def channel_shuffle(site: Site, x: Dims, groups: int) -> Dims:
    """Channels ``groups x inner`` become ``inner x groups``; the number of groups stays as it is written."""
    group, inner = axis(groups), axis(x[1].size // groups)
    site.freeze([group], "the number of groups is written in the call")
    site.equate(x[1], product((group, inner)))
    return (x[0], product((inner, group)), *x[2:])


@rule(aten.im2col.default, vanish=Vanish.MOVED)
def im2col(site: Site, x: Dims, kernel: Sequence[int], *_: Any) -> Dims:
    """Windows of positions: channels x places in the window, by windows."""
    inside, windows = axis(kernel[0] * kernel[1]), axis(site.shape[-1])
    site.freeze((inside, windows, *x[-2:]), "windows of positions")
    return (*x[:-3], product((x[-3], inside)), windows)


@rule(aten.col2im.default)
def col2im(site: Site, x: Dims, size: Any, kernel: Sequence[int], *_: Any) -> Dims:
    """The other way round: what windows say of a position is added up."""
    channels, inside = axis(site.shape[-3]), axis(kernel[0] * kernel[1])
    positions = site.fresh(site.shape[-2:])
    site.freeze((inside, x[-1], *positions), "windows of positions")
    site.equate(x[-2], product((channels, inside)))
    return (*x[:-2], channels, *positions)


@rule(aten.grid_sampler.default, vanish=Vanish.FIRST)
def grid_sampler(site: Site, x: Dims, grid: Dims, *_: Any) -> Dims:
    """Each channel read at positions that another tensor gives."""
    site.freeze((*x[2:], grid[-1]), "positions are chosen by value")
    lead = broadcast(site, [x[:1], grid[:1]])
    return (*lead, x[1], *grid[1:-1])
