"""Table look-up."""

from __future__ import annotations

from typing import Any

import torch

from shear_ir.axes import Dims
from shear_passes.rules.registry import Site, Vanish, rule

aten = torch.ops.aten


@rule(aten.embedding.default, vanish=Vanish.FIRST)
def embedding(site: Site, weight: Dims, indices: Dims, *_: Any, **__: Any) -> Dims:
    """``y[..., h] = w[indices[...], h]``: which rows are read is decided by values."""
    site.freeze(weight[:1], "rows are chosen by the values of the input")
    return (*indices, *weight[1:])
