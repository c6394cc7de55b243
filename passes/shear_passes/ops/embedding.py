"""Table look-up."""

from __future__ import annotations

from typing import Any

import torch

from shear_ir.axes import Dims, axis
from shear_passes.ops.registry import Results, Site, Vanish, rule
from shear_passes.ops.traits import Role, traits

aten = torch.ops.aten


traits("embedding lora.embedding", role=Role.EMBEDDING)


@rule(aten.embedding.default, vanish=Vanish.FIRST)
def embedding(site: Site, weight: Dims, indices: Dims, *_: Any, **__: Any) -> Dims:
    """``y[..., h] = w[indices[...], h]``: which rows are read is decided by values."""
    site.freeze(weight[:1], "rows are chosen by the values of the input")
    return (*indices, *weight[1:])


@rule(aten.embedding_bag.padding_idx, aten.embedding_bag.default)
def embedding_bag(site: Site, weight: Dims, indices: Dims, offsets: Dims, *_: Any, **__: Any) -> Results:
    """``y[b, h]``: the sum, the mean or the largest of ``w[i, h]`` over the indices i of bag b."""
    bags = axis(site.shapes[0][0])
    site.freeze((weight[0], *indices, *offsets, bags), "rows are chosen by the values of the input")
    numbers = [site.fresh(shape) for shape in site.shapes[1:]]
    for dims in numbers:
        site.freeze(dims, "rows are counted by value")
    largest = len(numbers[2]) == 2
    return [(bags, weight[1]), numbers[0], numbers[1], (bags, weight[1]) if largest else numbers[2]]
