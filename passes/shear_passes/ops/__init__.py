"""Axis typing rules: one operator family per file, one table from op to rule."""

from shear_passes.ops import (
    attention,
    conv,
    distance,
    embedding,
    expand,
    factory,
    index,
    linear,
    lora,
    matrix,
    norm,
    recurrent,
    reduce,
    select,
    shape,
)
from shear_passes.ops.registry import Entry, Site, Vanish, entry_of, rule

__all__ = [
    "Entry", "Site", "Vanish", "attention", "conv", "distance", "embedding", "entry_of", "expand", "factory", "index",
    "linear", "lora", "matrix", "norm", "recurrent", "reduce", "rule", "select", "shape",
]  # fmt: skip
