"""A basis of each head's values in which the first directions carry most: truncating them is then optimal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from shear_ir.axes import Indices
from shear_ir.errors import PlanError
from shear_passes.analysis.consumers import Consumers
from shear_passes.analysis.find_groups import Group, Groups, Slice


def rotated_heads(weights: Mapping[str, Tensor], groups: Groups, consumers: Consumers) -> dict[str, Tensor]:
    """Values and outputs of every attention in another basis, with the same function (Olica, 2025).

    The values of a head reach the output through ``W_o W_v``, of rank head_dim at most. With its singular value
    decomposition ``U S V^T``, ``W_v' = S^1/2 V^T`` and ``W_o' = U S^1/2`` make the same product, and keeping the first
    r units of the group is the nearest product of rank r. Query heads that share values share the basis.

    Raises ``PlanError`` when no group of the kind head_dim is read by a product of one parameter.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        if group.kind == "head_dim" and group.prunable:
            found |= _rotated(weights, groups, group, consumers)
    if not found:
        raise PlanError("there are no values of heads to rotate: no head_dim group is made and read by products alone")
    return found


def _rotated(weights: Mapping[str, Tensor], groups: Groups, group: Group, consumers: Consumers) -> dict[str, Tensor]:
    readers = {c.parameter for c in consumers.of(group)}
    made = [s for s in group.slices if s.parameter not in readers]
    read = [s for s in group.slices if s.parameter in readers]
    matrices = [s for s in made if weights[s.parameter].dim() == 2]
    plain = all(len(s.index_map) == 1 and weights[s.parameter].dim() < 3 for s in group.slices)
    if len(matrices) != 1 or len(read) != 1 or not plain:
        return {}
    (maker,), (reader,) = matrices, read
    rows, columns = _places(maker), _places(reader)
    if len(columns) % len(rows):  # the same channels are those of queries and keys too, which have no such basis
        return {}
    columns = columns.reshape(len(rows), -1, group.size)
    value = weights[maker.parameter].detach().movedim(maker.dim, 0).double()
    output = weights[reader.parameter].detach().movedim(reader.dim, 0).double()
    turns, back = _bases(value[rows], output[columns])
    changed = {reader.parameter: output.clone(), **{s.parameter: _rows(weights, s) for s in made}}
    changed[reader.parameter][columns] = torch.einsum("kvw,kgwo->kgvo", back.mT, output[columns])
    for piece in made:
        places = _places(piece)
        changed[piece.parameter][places] = torch.einsum("kvw,kw...->kv...", turns, changed[piece.parameter][places])
    dims = {s.parameter: s.dim for s in group.slices}
    return {n: t.movedim(0, dims[n]).to(weights[n].dtype).contiguous() for n, t in changed.items()}


def _rows(weights: Mapping[str, Tensor], piece: Slice) -> Tensor:
    return weights[piece.parameter].detach().movedim(piece.dim, 0).double().clone()


def _places(piece: Slice) -> Indices:
    """Where each unit is in its dim, shape ``(times the axis is repeated, units)``."""
    (owner,) = piece.index_map
    return np.stack([np.flatnonzero(owner == unit) for unit in range(piece.axis.size)], axis=1)


def _bases(value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """``T`` and its inverse for each key-value head, shapes ``(kv, v, v)``.

    ``value``: ``(kv, v, in)``; ``output``: ``(kv, g, v, out)``. With QR on both sides the decomposition is of v × v.
    """
    outer = output.movedim(1, 2).flatten(2)
    left, right = torch.linalg.qr(outer.mT).R, torch.linalg.qr(value.mT).R
    _, s, v = torch.linalg.svd(left @ right.mT)
    root = s.clamp_min(torch.finfo(s.dtype).eps).sqrt()
    # W_v = R_v^T Q_v^T, so that T W_v = S^1/2 V^T Q_v^T.
    turn = root[..., None] * (v @ torch.linalg.inv(right.mT))
    return turn, torch.linalg.inv(turn)
