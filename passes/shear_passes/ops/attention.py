"""scaled_dot_product_attention, kept whole by the exporter."""

from __future__ import annotations

import math
from typing import Any

import torch

from shear_ir.axes import Dims, axis, product
from shear_passes.ops.pointwise import broadcast
from shear_passes.ops.registry import Site, resize, rule
from shear_passes.ops.resizing import Resizing

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(
    site: Site,
    q: Dims,
    k: Dims,
    v: Dims,
    mask: Dims | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Dims:
    """``softmax(q k^T * scale + mask) v``: heads are shared, the keys' positions are summed over by the softmax.

    With ``enable_gqa`` the query heads are ``kv heads x g``.
    """
    site.equate(q[-1], k[-1])
    site.equate(k[-2], v[-2])
    heads = q[-3:-2]
    if options.get("enable_gqa") and q[-3].size != k[-3].size:
        site.equate(k[-3], v[-3])
        site.equate(q[-3], product((k[-3], axis(q[-3].size // k[-3].size))))
        lead = (*broadcast(site, [q[:-3], k[:-3], v[:-3]]), *heads)
    else:
        lead = broadcast(site, [q[:-2], k[:-2], v[:-2]])
    site.freeze([k[-2]], "softmax runs over the keys' positions")
    if is_causal:
        site.freeze([q[-2]], "positions are compared by number")
    if mask is not None:
        broadcast(site, [(*lead, q[-2], k[-2]), mask])
    site.contract([q[-1]], [(0, q[:-1]), (1, k[:-1])], inner=True)
    site.contract([v[-2]], [(2, (*v[:-2], v[-1]))], mixed=True)
    return (*lead, q[-2], v[-1])


@resize(aten.scaled_dot_product_attention.default)
def resize_attention(change: Resizing) -> None:
    """The implicit scale 1/sqrt(d) depends on head_dim: it becomes explicit, with the width it was trained at."""
    width = change.dims(0)[-1]
    if change.changed(width) and change.node.kwargs.get("scale") is None:
        change.set("scale", 1.0 / math.sqrt(width.size))
