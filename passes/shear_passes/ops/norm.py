"""Normalisation and softmax: what a statistic runs over cannot lose indices, unless it can be rescaled exactly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from shear_ir.axes import Dims, axis, product, resolve
from shear_passes.ops.registry import Need, Results, Site, Vanish, resize, rule
from shear_passes.ops.resizing import Resizing
from shear_passes.ops.traits import Low, Reduces, Sign, traits

aten = torch.ops.aten


traits("rms_norm", epsilon=3)
traits("layer_norm native_layer_norm group_norm", epsilon=4)
traits("native_batch_norm_legit_no_training", epsilon=6)
traits("batch_norm instance_norm", epsilon=7)
traits("weight_norm weight_norm_interface", chooses=True)
traits("softmax", reduces=Reduces.SHARE, low=Low.SHARES, sign=Sign.NOT_NEGATIVE, keeps_order=True)
traits("log_softmax", low=Low.LOG_SHARES, keeps_order=True)


@rule(aten.layer_norm.default, aten.native_layer_norm.default)
def layer_norm(
    site: Site, x: Dims, shape: list[int], weight: Dims | None = None, bias: Dims | None = None, *_: Any
) -> Dims | Results:
    """Centres and scales over the last dims: removing an index changes the mean of the others."""
    normed = x[len(x) - len(shape) :]
    site.freeze(normed, "layer normalisation runs over the axis and centres it, which no rescaling can mend")
    for tensor in (weight, bias):
        for dim, own in zip(normed, tensor or (), strict=False):
            site.equate(dim, own)
    return x if len(site.shapes) == 1 else [x, *(site.fresh(s) for s in site.shapes[1:])]


@rule(aten.rms_norm.default, vanish=Vanish.FIRST)
def rms_norm(site: Site, x: Dims, shape: list[int], weight: Dims | None = None, *_: Any) -> Dims:
    """``y = w * x / sqrt(mean(x^2) + eps)``: the mean over removed zeros differs by a known factor."""
    normed = x[len(x) - len(shape) :]
    for dim, own in zip(normed, weight or (), strict=False):
        site.equate(dim, own)
    site.contract(normed, [(0, x[: len(x) - len(shape)])], mean=True)
    return x


@resize(aten.rms_norm.default)
def resize_rms_norm(change: Resizing) -> None:
    """``sqrt(d/d') * norm(x; eps * d/d')`` over the d' kept channels is the norm over all d, the others zero."""
    dims = change.dims(0)[-len(change.node.args[1]) :]  # type: ignore[arg-type]
    factor = math.prod(d.size for d in dims) / math.prod(change.size(d) for d in dims)
    if factor != 1.0:
        _, _, *rest = (*change.node.args, None, None)[:4]
        eps = rest[1] if rest[1] is not None else torch.finfo(computed_in(change.dtype)).eps
        change.call(
            change.node.target,
            (change.node.args[0], [change.size(d) for d in dims], rest[0], eps * factor),  # type: ignore[operator]
        )
        change.after(aten.mul.Tensor, math.sqrt(factor))


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in single, whose epsilon is then the norm's."""
    return torch.promote_types(dtype, torch.float32)


@rule(aten.group_norm.default)
def group_norm(site: Site, x: Dims, groups: int, weight: Dims | None = None, bias: Dims | None = None, *_: Any) -> Dims:
    """Centres and scales over the channels of each group: a whole group can go, a channel of it cannot."""
    inner = axis(x[1].size // groups)
    site.freeze([inner], "group normalisation runs over the channels of a group")
    site.freeze(x[2:], "group normalisation runs over the positions")
    site.equate(x[1], product((axis(groups), inner)))
    for tensor in (weight, bias):
        if tensor is not None:
            site.equate(x[1], tensor[0])
    site.contract([], [(0, x), (2, x[1:2])], added=[3])
    return x


@resize(aten.group_norm.default)
def resize_group_norm(change: Resizing) -> None:
    """The number of groups follows the channels; their size never changes."""
    channels = change.dims(0)[1]
    if change.changed(channels):
        change.set(1, change.size(channels) * change.node.args[1] // resolve(channels).size)  # type: ignore[operator]


@rule(aten.batch_norm.default, aten.instance_norm.default, aten._native_batch_norm_legit_no_training.default)
def batch_norm(site: Site, x: Dims, *tensors: Any, **_: Any) -> Dims | Results:
    """Scales each channel by statistics of its own: weight, bias, running mean and variance follow the channels."""
    for tensor in tensors[:4]:
        if tensor is not None and not isinstance(tensor, bool):
            site.equate(x[1], tensor[0])
    if tensors[2] is None or site.node.target is aten.instance_norm.default:
        site.freeze((x[0], *x[2:]), "statistics are taken over the axis")
    if isinstance(tensors[0], tuple) and isinstance(tensors[1], tuple):
        # Weight and bias of a removed channel are zero in the masked model, and so is the result.
        site.contract([], [(1, [x[1]])], added=[2])
    return x if len(site.shapes) == 1 else [x, *(site.fresh(s) for s in site.shapes[1:])]


WEIGHT_NORMS = (aten._weight_norm.default, aten._weight_norm_interface.default)


@rule(*WEIGHT_NORMS, vanish=Vanish.ANY)
def weight_norm(site: Site, v: Dims, g: Dims, dim: int = 0) -> Dims | Results:
    """``w = g * v / |v|``, the norm over all dims but ``dim``, or over all: g follows the dim that it has.

    What the norm runs over may go: g is then scaled by what is left of the norm, see ``rewrite.rescale_gains``. That
    needs g and v to be parameters that are read in no other way.
    """
    over = [place for place in range(len(v)) if not g or g[place].size == 1]
    for mine, own in zip(v, g, strict=False):
        if own.size != 1:
            site.equate(mine, own)
    pair = site.node.args[:2]
    for other in pair:
        reads = other.users if isinstance(other, fx.Node) and other.op == "placeholder" else {site.node.prev: None}
        if any(user.target not in WEIGHT_NORMS or user.args[:2] != pair for user in reads):
            site.freeze(v, "a norm whose tensors are computed, or used elsewhere, runs over the axis")
    free = [d for place, d in enumerate(v) if place not in over]
    site.contract([v[place] for place in over], [(0, free)], inner=True)
    return v if len(site.shapes) == 1 else [v, g]


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(site: Site, x: Dims, dim: int, *_: Any, **__: Any) -> Dims:
    """Probabilities over ``dim`` share one sum, to which minus infinity adds nothing."""
    site.rank(0, x[dim], Need.WEIGHTLESS, "softmax runs over the axis")
    return x
