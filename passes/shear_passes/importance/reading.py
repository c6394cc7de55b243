"""Criteria that look at what consumers read and at their weights: Wanda-sp, FLAP, Minitron's activations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from shear_ir.axes import owners
from shear_ir.frontend.adapters import Adapter, find_adapters
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.consumers import Consumer, FindConsumers
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import (
    Importance,
    Reduce,
    Score,
    Scored,
    Scores,
    Statistic,
    candidates,
    reduced,
    weights_of,
)
from shear_passes.importance.calibration import Data
from shear_passes.importance.statistics import CalibrationStatistics, Moments, ReadStatistics

_AT_ONCE = 1 << 22
"""Numbers of a matrix that are looked at at once."""


@dataclass(frozen=True)
class ReadImportance(Importance):
    """A criterion that gives every feature of a consumer's input a score; units sum over their consumers.

    ``features``: how those of a unit become one: a key-value head has head_dim for each of its query heads.
    """

    features: Reduce = "sum"

    requires = (FindGroups, FindConsumers, ReadStatistics, Data)
    _weighs = True

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """What consumers read."""
        return (ReadStatistics(),)

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without data or weights; asking for a group that no consumer reads does so later."""
        seen = analyses.get(ReadStatistics())
        weights = _Weights(weights_of(analyses, self.name()), analyses.get(Data()).model) if self._weighs else None
        consumers = analyses.get(FindConsumers())
        known: dict[Consumer, Score] = {}
        scores: dict[Group, Score] = {}
        reasons: dict[Group, str] = {}
        for group in candidates(analyses):
            found = consumers.of(group)
            unseen = [c for c in found if c not in seen]
            if not found or unseen:
                reasons[group] = _reason(unseen)
                continue
            for consumer in found:
                if consumer not in known:
                    known[consumer] = self._features(consumer, seen, weights)
            scores[group] = self._of(group, found, known)
        return Scored(self.name(), scores, reasons)

    @abstractmethod
    def score(self, weight: Tensor | None, moments: Moments) -> Tensor:
        """The score of every feature, shape ``(features,)``; ``weight`` has shape ``(rows, features)``."""

    def _features(self, consumer: Consumer, seen: CalibrationStatistics, weights: _Weights | None) -> Score:
        moments = seen[consumer]
        if weights is None:
            return cast(Score, self.score(None, moments).double().cpu().numpy())
        matrix = consumer.matrix(weights[consumer.parameter])
        # Some features at a time: a table of tokens in single precision, squared, may be larger than the model.
        step = max(1, _AT_ONCE // max(1, len(matrix)))
        parts = (slice(start, start + step) for start in range(0, matrix.shape[1], step))
        scores = [self.score(matrix[:, part].float(), moments.of(part)).double().cpu() for part in parts]
        return cast(Score, torch.cat(scores).numpy())

    def _of(self, group: Group, found: Iterable[Consumer], known: Mapping[Consumer, Score]) -> Score:
        parts = [reduced(owners(c.features, group.axis), known[c], group.size, self.features) for c in found]
        return cast(Score, np.sum(parts, axis=0))


class _Weights:
    """Weights as the model computes with them: with what plain active adapters add, in fp32 where there are any."""

    def __init__(self, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
        self.tensors = tensors
        self.adapters: dict[str, list[Adapter]] = {}
        for adapter in find_adapters(model):
            if adapter.active and adapter.variant is None:
                self.adapters.setdefault(adapter.base, []).append(adapter)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.tensors[name].detach()
        for adapter in self.adapters.get(name, ()):
            weight = weight.float() + adapter.delta()
        return weight


def _reason(unseen: list[Consumer]) -> str:
    if unseen:
        return f"the calibration data showed nothing that {unseen[0].parameter} reads"
    return "no product of a parameter with what it makes sums over the axis"


@dataclass(frozen=True)
class Wanda(ReadImportance):
    """``|W_ij| · ‖X_j‖₂`` at the consumer, over its rows i, summed over the unit's features (Wanda-sp; Sun et al.
    2024, An et al. 2024).

    ``rows``: the mean over output rows, or their sum.
    """

    rows: Literal["mean", "sum"] = "mean"

    def score(self, weight: Tensor | None, moments: Moments) -> Tensor:
        """Shape ``(features,)``."""
        assert weight is not None
        norms = moments.squares.sqrt()
        size = weight.abs().mean(0) if self.rows == "mean" else weight.abs().sum(0)
        return size.to(norms) * norms


@dataclass(frozen=True)
class Flap(ReadImportance):
    """``Var_tokens(X_j) · ‖W_:j‖₂²`` at the consumer, the mean over a head's features (WIFV; An et al. 2024)."""

    features: Reduce = "mean"

    def score(self, weight: Tensor | None, moments: Moments) -> Tensor:
        """Shape ``(features,)``."""
        assert weight is not None
        return weight.square().sum(0).to(moments.variance) * moments.variance


@dataclass(frozen=True)
class Minitron(ReadImportance):
    """The mean over each sequence of abs(activation), in L2 over sequences and over a head's features.

    Activations are the inputs of consumers: of down_proj for a channel, of o_proj for a head, outputs of norms for a
    channel of the stream; what several consumers read counts once (Muralidharan et al. 2024). No weights are needed.
    """

    features: Reduce = "l2"

    _weighs = False

    def score(self, weight: Tensor | None, moments: Moments) -> Tensor:
        """Shape ``(features,)``."""
        return torch.sqrt(moments.row_means)

    def _of(self, group: Group, found: Iterable[Consumer], known: Mapping[Consumer, Score]) -> Score:
        once = {(c.sources, c.feature): c for c in reversed(list(found))}
        return super()._of(group, once.values(), known)
