"""Weights of a sheared model that were computed anew: their own rounding is no fault of the cut.

A norm over fewer channels has its weight scaled. Such a weight says more precisely than it is stored what it stands
for: all its entries are those of the original times one factor, and each tells the factor to within its own rounding.
It is read as that, so that what is left to excuse is tiny. Where no one factor explains a weight (merged adapters),
the step between two of its values is measured in the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shear_backends.verify.precision import unit_of
from shear_ir.plans import Plan, original

_OFFSETS = (0.0, 1.0)
"""What a module adds to a weight before it scales by it: nothing, or one, where norms start at zero."""


@dataclass
class Recomputed:
    """Tensors of a sheared model by their id.

    ``values``: what they stand for, in float64; ``others``: what they may stand for as well; ``steps``: the relative
    rounding of those of which that is not known.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    others: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.values or self.steps)


def recomputed(model: nn.Module, small: nn.Module, plan: Plan) -> Recomputed:
    """What in ``small`` was computed anew.

    Those are tensors of other names than ``model`` has (merged adapters, new biases), and those that differ nearly
    everywhere from what the plan keeps. One of which a few entries differ was not computed anew but damaged: nothing
    excuses it.
    """
    named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    found = Recomputed()
    for name, tensor in small.named_parameters():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        own = original(name, plan.gone)
        old = named.get(own, named.get(name))
        if old is not None:
            old = _cut(old, plan.kept.get(own, {})).to(tensor.device)
            if not _differs(old, tensor):
                continue
            factors = _factors(old, tensor.detach())
            if factors is not None:
                offset, low, high = factors
                exact = old.double() + offset
                found.values[id(tensor)] = exact * ((low + high) / 2) - offset
                found.others[id(tensor)] = exact * high - offset
                continue
        found.steps[id(tensor)] = unit_of(tensor.dtype)
    return found


def _cut(tensor: Tensor, dims: Mapping[int, object]) -> Tensor:
    cut = tensor.detach()
    for dim, kept in dims.items():
        cut = cut.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return cut


def _differs(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors differ nearly everywhere."""
    if old.shape != new.shape:
        return True
    old = old.to(new.dtype)
    # Entries that are zero stay zero. A sum of booleans would take eight bytes for each.
    return not torch.equal(old, new) and 2 * int((old != new).count_nonzero()) > int(old.count_nonzero())


def _factors(old: Tensor, new: Tensor) -> tuple[float, float, float] | None:
    """An offset and the least and the largest factor by which ``old`` rounds to ``new``; None where there is none."""
    if old.shape != new.shape or not bool(new.isfinite().all()):
        return None
    for offset in _OFFSETS:
        base, made = old.double() + offset, new.double() + offset
        # Half of the last place of each entry, and what float64 itself rounds.
        off = unit_of(new.dtype) * torch.exp2(torch.frexp(new.double()).exponent - 1.0) + 2.0**-50
        known = base != 0
        if not bool(known.any()) or bool((made[~known].abs() > off[~known]).any()):
            continue
        ends = torch.stack([(made - off)[known] / base[known], (made + off)[known] / base[known]])
        low, high = float(ends.amin(0).max()), float(ends.amax(0).min())
        if low <= high:
            middle = (low + high) / 2
            if low <= float(torch.tensor(middle, dtype=torch.float32)) <= high:
                # Scaled by a factor in single precision, which stands for any that rounds to it.
                low, high = min(low, middle * (1 - 2.0**-24)), max(high, middle * (1 + 2.0**-24))
            return offset, low, high
    return None
