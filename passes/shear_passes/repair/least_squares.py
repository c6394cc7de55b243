"""Least squares: what a consumer reads of the features that stay stands in for those that go."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.plans import Plan
from shear_passes.analysis.consumers import Consumers, FindConsumers
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.importance.statistics import CalibrationStatistics, Moments, ReadStatistics
from shear_passes.repair.base import LostFeatures, Repair, losses
from shear_passes.rewrite.cuts import Selection


@dataclass(frozen=True)
class LeastSquares(Repair):
    """``W' = argmin |X_kept W'^T - X W^T|^2 + lambda |W' - W_kept|^2``, folded into the consumer's own weight.

    With M the ridge regression of the features that go on those that stay, ``X_gone = X_kept M``, this is
    ``W' = W_kept + W_gone M^T`` (Olica, 2025, without its side branch): the architecture stays, a cut of nothing
    changes nothing, and where what goes is a combination of what stays nothing is lost. Where the consumer has a
    bias, the regression has an intercept, which goes into it. ``ridge``: lambda over the mean square of a feature
    that stays.
    """

    ridge: float = 1e-2

    requires = (FindGroups, FindConsumers, ReadStatistics, Selection)
    gram: ClassVar[bool] = True

    def repaired(
        self, weights: Mapping[str, Tensor], groups: Groups, plan: Plan, consumers: Consumers,
        statistics: CalibrationStatistics,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Raises ``PlanError`` for a ridge that is not positive."""
        if not self.ridge > 0.0:
            raise PlanError(f"ridge of least squares is a positive number, not {self.ridge}")
        found: dict[str, Tensor] = {}
        current: Mapping[str, Tensor] = ChainMap(found, dict(weights))
        solved: tuple[Any, Any] = (None, None)
        for loss in losses(groups, plan, consumers, statistics):
            if not loss.consumer.sole:  # an embedding that is tied to it would change as well
                continue
            # Consumers of the same values, such as gate and up, share one regression.
            key = id(loss.moments), bool(loss.bias)
            if solved[0] != key:
                solved = key, _regression(loss.moments, loss.stays, self.ridge, centred=bool(loss.bias))
            found |= _folded(current, loss, *solved[1])
        return found


def _regression(moments: Moments, stays: Tensor, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
    """M, shape ``(kept, gone)``, and what of the mean of the features that go it leaves out, shape ``(gone,)``."""
    gram = moments.gram
    assert gram is not None
    mean = moments.mean.to(gram)
    if centred:
        gram = gram - moments.count * mean[:, None] * mean
    stays = stays.to(gram.device)
    inner, cross = gram[stays][:, stays], gram[stays][:, ~stays]
    weight = ridge * inner.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    inner = inner + weight * torch.eye(len(inner), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(inner, cross)
    return solution, mean[~stays] - mean[stays] @ solution


def _folded(weights: Mapping[str, Tensor], loss: LostFeatures, solution: Tensor, rest: Tensor) -> dict[str, Tensor]:
    consumer = loss.consumer
    old = weights[consumer.parameter].detach()
    turned = old.movedim(consumer.dim, -1).double()
    stays = loss.stays.to(old.device)
    gone = turned[..., ~stays]
    turned[..., stays] += gone @ solution.to(turned).T
    found = {consumer.parameter: turned.movedim(-1, consumer.dim).to(old.dtype).contiguous()}
    if loss.bias:
        bias = weights[loss.bias].detach()
        # A convolution adds its bias once, and each position of its kernel reads a feature of the same mean.
        shift = (gone.reshape(len(gone), -1, gone.shape[-1]).sum(1) if gone.dim() > 2 else gone) @ rest.to(turned)
        found[loss.bias] = (bias.double() + shift).to(bias.dtype)
    return found
