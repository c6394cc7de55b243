"""The composed operators ``lora.*``: a base map with its low-rank branches as one call that runs, trains and exports.

    lora.linear(x, weight, bias, A=[a], B=[b], scale=[s])        base(x) + s * B(A(x))
    lora.embedding(weight, indices, A=[a], B=[b], scale=[s])
    lora.conv(x, weight, bias, stride, padding, dilation, A=[a], B=[b], scale=[s])
    lora.experts(weight, A=[a], B=[b], scale=[s])                weight[e] + s * B[e] A[e]

Each list has one entry per adapter: A is ``(rank, in, ...)``, B ``(out, rank, ...)``, whatever way the base lies; of
stacked experts ``(experts * rank, in)`` and ``(out, rank * experts)``.
``B_bias``, ``dropout`` and ``magnitude`` have None or 0.0 for adapters without. With a magnitude the rows of the
adapted weight are scaled to it (DoRA, arXiv 2402.09353, whose norms get no gradient); a row that is all zero has no
direction to scale and gives zero, where 0/0 would be no number. The result has the dtype of the base.

They are composite: ``torch.export`` takes them, and ``run_decompositions`` leaves aten alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_BRANCHES = (
    "Tensor[] A, Tensor[] B, float[] scale, Tensor?[]? B_bias=None, float[]? dropout=None, Tensor?[]? magnitude=None"
)

_library: Any = torch.library.Library("lora", "DEF")  # type: ignore[no-untyped-call]  # torch gives it no types
_library.define(f"linear(Tensor x, Tensor weight, Tensor? bias=None, *, {_BRANCHES}, bool transposed=False) -> Tensor")
_library.define(f"embedding(Tensor weight, Tensor indices, int padding_idx=-1, *, {_BRANCHES}) -> Tensor")
_library.define(
    "conv(Tensor x, Tensor weight, Tensor? bias=None, int[] stride=[1], int[] padding=[0], int[] dilation=[1], *, "
    f"{_BRANCHES}) -> Tensor"
)
_library.define("experts(Tensor weight, *, Tensor[] A, Tensor[] B, float[] scale, bool transposed=False) -> Tensor")

Optionals = Sequence[Tensor | None] | None


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, A: Sequence[Tensor], B: Sequence[Tensor],
    scale: Sequence[float], B_bias: Optionals = None, dropout: Sequence[float] | None = None,
    magnitude: Optionals = None, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """``transposed``: the weight is ``(in, out)``."""
    rows = weight.t() if transposed else weight
    base = F.linear(x, rows, bias)
    made = [
        F.linear(F.linear(_dropped(x.to(a.dtype), dropout, place), a), b, _at(B_bias, place))
        for place, (a, b) in enumerate(zip(A, B, strict=True))
    ]
    gains = [_gain(_at(magnitude, k), rows, a, b, s) for k, (a, b, s) in enumerate(zip(A, B, scale, strict=True))]
    return _sum(base, bias, made, scale, gains)


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *, A: Sequence[Tensor], B: Sequence[Tensor],
    scale: Sequence[float], B_bias: Optionals = None, dropout: Sequence[float] | None = None,
    magnitude: Optionals = None,
) -> Tensor:  # fmt: skip
    """``weight`` is ``(vocab, out)``; an embedding adapter has neither a bias nor dropout."""
    base = torch.embedding(weight, indices, padding_idx)
    made = [
        F.linear(torch.embedding(a.t(), indices, padding_idx), b, _at(B_bias, place))
        for place, (a, b) in enumerate(zip(A, B, strict=True))
    ]
    gains = [_gain(_at(magnitude, k), weight.t(), a, b, s) for k, (a, b, s) in enumerate(zip(A, B, scale, strict=True))]
    return _sum(base, None, made, scale, gains)


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1,), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), *, A: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float],
    B_bias: Optionals = None, dropout: Sequence[float] | None = None, magnitude: Optionals = None,
) -> Tensor:  # fmt: skip
    """A has the kernel, stride, padding and dilation of the base; B is a map of channels."""
    spatial = weight.dim() - 2
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1]
    base = convolve(x, weight, bias, stride, padding, dilation)
    made = [
        convolve(
            convolve(_dropped(x.to(a.dtype), dropout, place), a, None, stride, padding, dilation), b, _at(B_bias, place)
        )
        for place, (a, b) in enumerate(zip(A, B, strict=True))
    ]
    gains = [_gain(_at(magnitude, k), weight, a, b, s) for k, (a, b, s) in enumerate(zip(A, B, scale, strict=True))]
    over = (-1, *(1 for _ in range(spatial)))
    shift = None if bias is None else bias.view(over)
    return _sum(base, shift, made, scale, [None if gain is None else gain.view(over) for gain in gains])


def _experts(
    weight: Tensor, *, A: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float], transposed: bool = False
) -> Tensor:
    """``weight`` is ``(experts, out, in)``, turned ``(experts, in, out)``; the factors have the experts end to end."""
    experts = weight.shape[0]
    total = weight
    for a, b, factor in zip(A, B, scale, strict=True):
        rows = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).to(weight.dtype)
        columns = a.reshape(experts, -1, a.shape[1]).to(weight.dtype)
        left, right = (columns.mT, rows.mT) if transposed else (rows, columns)
        total = torch.baddbmm(total, left, right, alpha=factor)
    return total


def _sum(
    base: Tensor, bias: Tensor | None, made: Sequence[Tensor], scale: Sequence[float], gains: Sequence[Tensor | None]
) -> Tensor:
    """The base with all branches; a gain scales the whole adapted map but for the bias of the base."""
    total = base
    for branch, factor, gain in zip(made, scale, gains, strict=True):
        if gain is not None:
            total = total + (gain - 1) * (base if bias is None else base - bias)
            branch = gain * branch
        total = total + branch * factor
    return total.to(base.dtype)


def _gain(magnitude: Tensor | None, rows: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor | None:
    """What DoRA scales each row by, shape ``(out,)``: its magnitude over the norm of the adapted row."""
    if magnitude is None:
        return None
    delta = b.flatten(1) @ a.flatten(1)
    norm = (rows.flatten(1).to(a.dtype) + scale * delta).detach().norm(dim=1)
    gain: Tensor = magnitude.flatten() / norm.masked_fill(norm == 0, math.inf)
    return gain


def _at(values: Optionals, place: int) -> Tensor | None:
    return None if values is None else values[place]


def _dropped(x: Tensor, dropout: Sequence[float] | None, place: int) -> Tensor:
    """Dropout as it is in a graph traced for evaluation: it is there and does nothing."""
    return torch.dropout(x, dropout[place], False) if dropout and dropout[place] else x


for _name, _function in (("linear", _linear), ("embedding", _embedding), ("conv", _conv), ("experts", _experts)):
    _library.impl(_name, _function, "CompositeImplicitAutograd")
