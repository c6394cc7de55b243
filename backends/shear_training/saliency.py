"""Saliency of units while adapters learn: which important unit is the least (LoRAShear, section 3 of the reference)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shear_ir.errors import PlanError
from shear_passes.analysis.find_groups import Group
from shear_passes.importance.base import Scores
from shear_training.units import Units, norms_along


@dataclass(frozen=True)
class Sums:
    """Sums over whole units, each of shape ``(units,)`` in fp32, of base slices W and of ``D = scaling · B·A``."""

    weight: Tensor
    delta: Tensor
    inner: Tensor
    sizes: Tensor


def sums(units: Units) -> Sums:
    """``|W|^2``, ``|D|^2`` and ``<W, D>`` of every unit; one layer's delta is in memory at a time."""
    weight, delta, inner = (torch.zeros(units.count + 1, device=units.device) for _ in range(3))
    for place in units.places:
        owner = place.owner.to(units.device) % (units.count + 1)
        base = place.tensor.detach().float()
        weight.index_add_(0, owner, norms_along(base.square(), place.dim).to(units.device))
        if place.adapters:
            change = sum(adapter.delta() for adapter in place.adapters)
            assert isinstance(change, Tensor)
            delta.index_add_(0, owner, norms_along(change.square(), place.dim).to(units.device))
            inner.index_add_(0, owner, norms_along(base * change, place.dim).to(units.device))
    return Sums(weight[:-1], delta[:-1], inner[:-1], units.sizes())


def _cosine(s: Sums) -> Tensor:
    norms = (s.weight * s.delta).sqrt()
    return torch.where(norms > 0, s.inner / norms.clamp_min(torch.finfo(torch.float32).tiny), 0.0) + 1.0


SALIENCIES: Mapping[str, Callable[[Sums], Tensor]] = {
    "magnitude": lambda s: s.weight.sqrt(),
    "average_magnitude": lambda s: s.weight.sqrt() / s.sizes,
    "cosine": _cosine,
    "first_order": lambda s: s.inner.abs(),
    "second_order": lambda s: 0.5 * s.inner.square(),
}
"""With W a unit's base slices and D what its adapters learned since the period began: ``|W|``; ``|W| / numel``;
``<W,D> / (|W| |D|) + 1``; ``|<W,D>|``; ``<W,D>^2 / 2``."""

DEFAULT_WEIGHTS: Mapping[str, float] = dict.fromkeys(SALIENCIES, 1.0)

Measured = Mapping[str, Scores]
"""Criterion to the scores of every group: what ``shear_ir.scores`` measured before the training."""


def measured_names(weights: Mapping[str, float]) -> list[str]:
    """The criteria among those weighed that are measured before the training, on data."""
    return [name for name in weights if name not in SALIENCIES]


def saliency(units: Units, weights: Mapping[str, float] = DEFAULT_WEIGHTS, measured: Measured | None = None) -> Tensor:
    """The weighted sum of the criteria, each over its L2 norm among all units of a kind; shape ``(units,)``, fp32.

    ``measured``: scores of the criteria that are none of ``SALIENCIES``. Where no adapter has learned anything yet,
    these alone, or without any the magnitude. Raises ``PlanError`` for an unknown criterion.
    """
    measured = measured or {}
    check_weights(weights, measured)
    weights = {name: weight for name, weight in weights.items() if weight}
    known = {name: _numbered(units, measured[name]) for name in weights if name in measured}
    found = sums(units)
    learned = bool((found.delta > 0).any())
    used = weights if learned else {name: weights[name] for name in known} or {"magnitude": 1.0}
    score = torch.zeros(units.count, device=units.device)
    for kind in units.kinds().values():
        kind = kind.to(units.device)
        for name, weight in used.items():
            values = (known[name] if name in known else SALIENCIES[name](found))[kind]
            score[kind] += weight * _unit(values).to(score)
    return score


def _unit(values: Tensor) -> Tensor:
    """``values`` over their L2 norm; what is infinite, such as a unit that is never to go, stays so and counts not."""
    finite = torch.where(values.isfinite(), values, 0.0).double()
    largest = finite.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    scaled = finite / largest  # whose squares neither vanish nor overflow
    return torch.where(values.isfinite(), scaled / scaled.norm().clamp_min(1e-30), values.double())


def _numbered(units: Units, scores: Scores) -> Tensor:
    """Scores by group as those of all units, shape ``(units,)``; another trace of the model has the same names."""
    named = {group.name: group for group in scores}

    def of(group: Group) -> Tensor:
        try:
            return torch.from_numpy(scores[named.get(group.name, group)])
        except KeyError as failure:
            raise PlanError(f"scores say nothing of {group.name}: pass those of this model") from failure

    return torch.cat([of(group) for group in units.groups]).to(units.device)


def check_weights(weights: Mapping[str, float], measured: Iterable[str] = ()) -> None:
    """Raise ``PlanError`` for a criterion that neither exists nor was ``measured``, or weights that say nothing."""
    for name, weight in weights.items():
        if name not in SALIENCIES and name not in measured:
            raise PlanError(f"there is no saliency criterion '{name}'; there are {', '.join(SALIENCIES)}")
        if not 0.0 <= weight < float("inf"):
            raise PlanError(f"the weight of the criterion '{name}' is a number from 0 up, not {weight}")
    if not any(weights.values()):
        raise PlanError(f"no saliency criterion has a weight; there are {', '.join(SALIENCIES)}")
