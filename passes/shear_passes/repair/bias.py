"""Bias compensation: the mean of what a consumer no longer reads goes into its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.plans import Plan
from shear_passes.analysis.consumers import Consumers, FindConsumers
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.importance.statistics import CalibrationStatistics, ReadStatistics
from shear_passes.repair.base import Repair, losses
from shear_passes.rewrite.cuts import Selection


@dataclass(frozen=True)
class FlapBias(Repair):
    """``b' = b + W (E[X] * gone)`` (FLAP, An et al. 2024). A consumer without a bias needs one first, which changes
    the architecture: ``shear_ir.with_biases``."""

    requires = (FindGroups, FindConsumers, ReadStatistics, Selection)

    def repaired(
        self, weights: Mapping[str, Tensor], groups: Groups, plan: Plan, consumers: Consumers,
        statistics: CalibrationStatistics,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Raises ``PlanError`` for a consumer without a bias."""
        found: dict[str, Tensor] = {}
        for loss in losses(groups, plan, consumers, statistics):
            consumer = loss.consumer
            if not loss.bias:
                raise PlanError(
                    f"{consumer.parameter} has no bias that could carry what is lost: give the model biases "
                    "(with_biases, --add-biases), which changes its architecture"
                )
            weight, bias = weights[consumer.parameter].detach().double(), weights[loss.bias].detach()
            gone = loss.moments.mean.to(weight) * ~loss.stays.to(weight.device)
            shift = weight.movedim(consumer.dim, -1) @ gone
            known = found.get(loss.bias, bias).double()
            found[loss.bias] = (known + (shift.flatten(1).sum(1) if shift.dim() > 1 else shift)).to(bias.dtype)
        return found
