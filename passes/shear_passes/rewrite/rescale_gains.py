"""Exact normalised weights on fewer indices: ``g * v / |v|`` where v loses some of what the norm runs over.

The norm over what stays is smaller, and so what stays would grow: removing a unit would change what the others do. With
``g * |kept v| / |v|`` in place of g it is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from shear_ir.plans import Kept


def gained(tensors: Mapping[str, Tensor], kept: Kept, gains: Mapping[str, str]) -> dict[str, Tensor]:
    """``tensors``, uncut, with each g of ``gains`` scaled for the indices that its v keeps.

    A v of shape ``(out, in, ...)`` has a g of the same rank, of size 1 in every dim that the norm runs over, or a
    number, where it runs over all.
    """
    found = dict(tensors)
    with torch.no_grad():
        for name, of in gains.items():
            g, v = tensors[name], tensors[of].double()
            over = normed_dims(g, v)
            stays = v.clone()
            for dim in over:
                gone = np.setdiff1d(np.arange(v.shape[dim]), kept.get(of, {}).get(dim, np.arange(v.shape[dim])))
                stays.index_fill_(dim, torch.from_numpy(gone).to(v.device), 0)
            before, after = (torch.linalg.vector_norm(t, dim=over, keepdim=g.dim() > 0) for t in (v, stays))
            scale = torch.where(before > 0, after / before, 1.0).reshape(g.shape)
            found[name] = (g * scale).to(g.dtype)
    return found


def normed_dims(g: Tensor, v: Tensor) -> list[int]:
    """The dims of ``v`` that its norm runs over."""
    return [dim for dim in range(v.dim()) if g.dim() == 0 or g.shape[dim] == 1]
