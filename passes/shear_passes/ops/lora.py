"""Composed operators: B's rows follow the base's rows, A's columns its columns; the rank of an adapter is its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import shear_passes.composed  # noqa: F401  # defines the operators
from shear_ir.axes import Dim, Dims, axis, product
from shear_passes.ops.conv import conv
from shear_passes.ops.registry import Site, rule
from shear_passes.ops.traits import traits

_lora = torch.ops.lora


traits("lora.experts", chooses=True, converts=True)


@rule(_lora.linear.default)
def linear(
    site: Site, x: Dims, weight: Dims, bias: Dims | None = None, *, A: list[Dims], B: list[Dims],
    transposed: bool = False, **options: Any,
) -> Dims:  # fmt: skip
    """``y[..., o] = sum_i x[..., i] (w[o, i] + sum_k s_k sum_r B_k[o, r] A_k[r, i]) + b[o]``, or w transposed."""
    in_, out = weight if transposed else (weight[1], weight[0])
    site.equate(x[-1], in_)
    if bias is not None:
        site.equate(bias[0], out)
    lead = x[:-1]
    site.contract([in_], [(0, lead), (1, [out])], added=[2])
    _branches(site, 0, lead, [in_], out, A, B, options)
    _magnitudes(site, 1, [in_], out, A, options)
    return (*lead, out)


@rule(_lora.embedding.default)
def embedding(
    site: Site, weight: Dims, indices: Dims, padding_idx: int = -1, *, A: list[Dims], B: list[Dims], **options: Any
) -> Dims:
    """``y[..., o] = w[i[...], o] + sum_k s_k sum_r A_k[r, i[...]] B_k[o, r]``: which rows are read, values decide."""
    rows, out = weight
    site.freeze([rows], "rows are chosen by the values of the input")
    site.contract([], [(0, [out])])
    _branches(site, None, indices, [rows], out, A, B, options)
    _magnitudes(site, 0, [rows], out, A, options)
    return (*indices, out)


@rule(_lora.conv.default)
def convolution(
    site: Site, x: Dims, weight: Dims, bias: Dims | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    *, A: list[Dims], B: list[Dims], **options: Any,
) -> Dims:  # fmt: skip
    """The same at every position; A has the kernel of the base, B none."""
    y = conv(site, x, weight, bias, stride, padding, dilation)
    for b in B:
        site.freeze(b[2:], "kernel positions")
    _branches(site, 0, x[: 1 - len(weight)], weight[1:], weight[0], A, B, options)
    _magnitudes(site, 1, weight[1:], weight[0], A, options)
    return y


@rule(_lora.experts.default)
def experts(site: Site, weight: Dims, *, A: list[Dims], B: list[Dims], transposed: bool = False, **_: Any) -> Dims:
    """``y[e, o, i] = w[e, o, i] + sum_k s_k sum_r B_k[o, (r, e)] A_k[(e, r), i]``, or the last two dims turned."""
    count, *rest = weight
    in_, out = rest if transposed else (rest[1], rest[0])
    nodes: Any = site.node.kwargs
    site.contract([], [(0, weight)])
    for place, (a, b) in enumerate(zip(A, B, strict=True)):
        rank = axis(a[0].size // count.size)
        for mine, other in ((a[0], product((count, rank))), (b[1], product((rank, count))), (a[1], in_), (b[0], out)):
            site.equate(mine, other)
        site.contract([rank], [(nodes["B"][place], (count, out)), (nodes["A"][place], (count, in_))])
    return weight


def _branches(
    site: Site, x: int | None, lead: Dims, over: Sequence[Dim], out: Dim, A: list[Dims], B: list[Dims],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """What each adapter sums over: first ``over``, unless it only looks rows up (``x`` None), then its rank."""
    nodes: Any = site.node.kwargs
    for place, (a, b) in enumerate(zip(A, B, strict=True)):
        rank, *columns = a
        for mine, other in zip((*columns, *b[:2]), (*over, out, rank), strict=True):
            site.equate(mine, other)
        a_node, b_node = nodes["A"][place], nodes["B"][place]
        shift = _given(options, "B_bias", place)
        if shift is not None:
            site.equate(shift[0], out)
        added = [] if shift is None else [nodes["B_bias"][place]]
        if x is None:
            site.contract([rank], [(a_node, ()), (b_node, [out])], added=added)
            continue
        site.contract(over, [(x, lead), (a_node, [rank])], inner=True)
        site.contract([rank, *b[2:]], [(x, lead), (b_node, [out])], added=added)


def _magnitudes(site: Site, weight: int, over: Sequence[Dim], out: Dim, A: list[Dims], options: dict[str, Any]) -> None:
    """DoRA sums the squares of the adapted rows: what goes must be zero in the base and in A."""
    nodes: Any = site.node.kwargs
    for place, a in enumerate(A):
        magnitude = _given(options, "magnitude", place)
        if magnitude is None:
            continue
        site.equate(next((d for d in magnitude if d.size == out.size), out), out)
        site.contract(over, [(weight, [out])], inner=True)
        site.contract(over, [(nodes["A"][place], a[:1])], inner=True)


def _given(options: dict[str, Any], name: str, place: int) -> Dims | None:
    """An adapter's own tensor, where it has one."""
    values = options.get(name)
    found: Dims | None = values[place] if values else None
    return found
