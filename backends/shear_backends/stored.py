"""Weights of a sheared model that were computed anew: their own rounding is no fault of the cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shear_backends.precision import unit_of
from shear_ir.plans import Plan, original


def recomputed(model: nn.Module, small: nn.Module, plan: Plan) -> dict[int, float]:
    """By the id of a tensor of ``small``, the relative rounding it may carry.

    Those are tensors of other names than ``model`` has (merged adapters, new biases), and those that differ nearly
    everywhere from what the plan keeps (a norm that was scaled). One of which a few entries differ was not computed
    anew but damaged: nothing excuses it.
    """
    named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    found: dict[int, float] = {}
    for name, tensor in small.named_parameters():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        old = named.get(original(name, plan.gone), named.get(name))
        if old is None or _scaled(_cut(old, plan, original(name, plan.gone)), tensor):
            found[id(tensor)] = unit_of(tensor.dtype)
    return found


def _cut(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    cut = tensor.detach()
    for dim, kept in plan.kept.get(name, {}).items():
        cut = cut.index_select(dim, torch.from_numpy(kept).to(tensor.device))
    return cut


def _scaled(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape:
        return True
    other = old.to(new.device, new.dtype) != new
    # Entries that are zero stay zero.
    return bool(other.sum() * 2 > (old != 0).sum().to(new.device))
