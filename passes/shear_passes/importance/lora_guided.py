"""LoRA-guided: what adapters' gradients say of the frozen weights they sit on (LoRAPrune; Zhang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.frontend.adapters import find_adapters
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.consumers import Consumer, FindConsumers
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance.base import (
    Importance,
    Score,
    Scored,
    Scores,
    Statistic,
    candidates,
    over_slices,
    parameters_of,
    sums_along,
)
from shear_passes.importance.calibration import Calibration, CalibrationStep, Data, Observer, Portion
from shear_passes.importance.gradients import trainable


@dataclass(eq=False)
class _Branch:
    """``W + scaling · B·A`` on one weight; ``turned``: the weight is stored as (in, out)."""

    name: str
    weight: Tensor
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    turned: bool
    grads: dict[str, Tensor] = field(default_factory=dict)

    def saliency(self) -> Tensor:
        """``(Ĝ ⊙ (W + s·BA))²`` with ``Ĝ = G_B A + B G_A − G_B G_A``, in the shape of the weight."""
        a, b = self.a.detach().float(), self.b.detach().float()
        # A factor that the loss does not reach has gradient zero, as A has while B is zero.
        of_a, of_b = (self.grads.get(n, torch.zeros_like(t)).float() for n, t in (("a", a), ("b", b)))
        guided = of_b @ a + b @ of_a - of_b @ of_a
        delta = self.scaling * (b @ a)
        weight = self.weight.detach().float()
        return (guided.T * (weight + delta.T) if self.turned else guided * (weight + delta)).square()


@dataclass(frozen=True)
class AdapterStatistics(Statistic[Mapping[tuple[str, int], Score]]):
    """By parameter and dim, the moving average over batches of the sums of ``_Branch.saliency`` along that dim.

    A model without adapters gets some for the time of the pass: B zero, A random, of this ``rank``, on every matrix
    that a module of its own reads.
    """

    rank: int = 8
    decay: float = 0.9
    seed: int = 0

    requires = (FindGroups, FindConsumers, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> Observer:
        """Raises ``PlanError`` for adapters other than plain LoRA."""
        if self.rank < 1 or not 0.0 <= self.decay < 1.0:
            raise PlanError("LoRA-guided scores need a rank from 1 up, and a decay from 0 to below 1")
        groups = candidates(analyses)
        dims: dict[str, set[int]] = {name: set() for name in parameters_of(program, groups)}
        for piece in (s for g in groups for s in g.slices if s.parameter in dims):
            dims[piece.parameter].add(piece.dim)
        hosts = [c for c in analyses.get(FindConsumers()) if c.parameter in dims]
        own = _own(calibration.model, dims)
        return _AdapterObserver(self, dims, own, [] if own else _hosts(program, calibration.model, hosts))


def _own(model: nn.Module, names: Mapping[str, Any]) -> list[_Branch]:
    """The active adapters that the model has."""
    found = []
    for adapter in find_adapters(model):
        if not adapter.active or adapter.base not in names:
            continue
        if adapter.variant is not None or adapter.row_dim is None or adapter.factors[0].dim() != 2:
            raise PlanError(f"the adapter '{adapter.name}' of {adapter.module} is no plain LoRA of a matrix")
        a, b = adapter.factors
        assert isinstance(a, nn.Parameter)
        assert isinstance(b, nn.Parameter)
        found.append(_Branch(adapter.base, adapter.weight, a, b, adapter.scaling, adapter.row_dim == 1))
    return found


def _hosts(program: Program, model: nn.Module, hosts: Sequence[Consumer]) -> list[tuple[Consumer, nn.Parameter]]:
    tensors = trainable(model, program, [c.parameter for c in hosts])
    return [(c, tensors[c.parameter]) for c in hosts if c.modules and tensors[c.parameter].dim() == 2]


class _AdapterObserver(Observer):
    backward = True

    def __init__(
        self, asked: AdapterStatistics, dims: Mapping[str, set[int]], own: Sequence[_Branch],
        hosts: Sequence[tuple[Consumer, nn.Parameter]],
    ) -> None:  # fmt: skip
        self.asked, self.dims, self.hosts = asked, dims, hosts
        self.branches = list(own)
        self.average: dict[tuple[str, int], Score] = {}

    def portion(self, calibration: Calibration) -> Portion:
        """Whole batches, for it is their moving average."""
        return "whole"

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        draw = torch.Generator().manual_seed(self.asked.seed)
        with ExitStack() as hooks:
            for consumer, weight in self.hosts:
                branch = self._fresh(consumer, weight, draw)
                self.branches.append(branch)
                for path in consumer.modules or ():
                    module = calibration.model.get_submodule(path)
                    hooks.callback(module.register_forward_hook(partial(_add, calibration, branch)).remove)
            for branch in self.branches:
                for name, factor in (("a", branch.a), ("b", branch.b)):
                    calibration.on_gradient(factor, partial(branch.grads.__setitem__, name))
            yield

    def _fresh(self, consumer: Consumer, weight: nn.Parameter, draw: torch.Generator) -> _Branch:
        in_, out = consumer.features.size, weight.numel() // consumer.features.size
        bound = 1 / math.sqrt(in_)
        a = torch.empty(self.asked.rank, in_).uniform_(-bound, bound, generator=draw).to(weight.device)
        b = torch.zeros(out, self.asked.rank, device=weight.device)
        return _Branch(consumer.parameter, weight, nn.Parameter(a), nn.Parameter(b), 1.0, consumer.dim == 0)

    def after(self, step: CalibrationStep) -> None:
        keep = self.asked.decay
        for branch in self.branches:
            element = branch.saliency()
            branch.grads.clear()
            for dim in self.dims[branch.name]:
                place = (branch.name, dim)
                self.average[place] = keep * self.average.get(place, 0.0) + (1 - keep) * sums_along(element, dim)

    def finish(self) -> Mapping[tuple[str, int], Score]:
        return self.average


def _add(calibration: Calibration, branch: _Branch, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    if not calibration.watching:
        return output
    x: Tensor = args[0]
    return output + branch.scaling * (x @ branch.a.T.to(x.dtype)) @ branch.b.T.to(x.dtype)


@dataclass(frozen=True)
class LoraGuided(Importance):
    """``Σ (Ĝ ⊙ (W + s·BA))²`` over the unit's slices, ``Ĝ = G_B A + B G_A − G_B G_A``: no gradient of W is made.

    A moving average over batches, which keeps ``decay`` of what came before. The model's own active adapters are used
    where it has some; else fresh ones of this ``rank``, from ``seed``.
    """

    rank: int = 8
    decay: float = 0.9
    seed: int = 0

    requires = (FindGroups, AdapterStatistics)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """Gradients of adapters."""
        return (AdapterStatistics(self.rank, self.decay, self.seed),)

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without data or a loss."""
        sums = analyses.get(AdapterStatistics(self.rank, self.decay, self.seed))
        groups = candidates(analyses)
        seen = [g for g in groups if any((s.parameter, s.dim) in sums for s in g.slices)]
        reasons = {g: "none of its weights carries an adapter" for g in groups if g not in seen}
        return Scored("lora-guided", {g: over_slices(program, g, sums) for g in seen}, reasons)
