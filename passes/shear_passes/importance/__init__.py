"""Importance criteria, one interface: a score for every unit of every group, from weights and from data."""

from __future__ import annotations

from shear_passes.importance.base import Importance, Scores, Statistic, collect
from shear_passes.importance.block_influence import BlockInfluence
from shear_passes.importance.bonsai import Bonsai
from shear_passes.importance.calibration import Calibration, Data
from shear_passes.importance.custom import Custom, Evidence, as_criterion
from shear_passes.importance.lora_guided import LoraGuided
from shear_passes.importance.magnitude import Magnitude
from shear_passes.importance.mini_llm import MiniLlm
from shear_passes.importance.names import CRITERIA, DEFAULT_WITH_DATA, HARMLESS, blind_costs, criterion, default
from shear_passes.importance.order import Order
from shear_passes.importance.random import Random
from shear_passes.importance.reading import Flap, Minitron, Wanda
from shear_passes.importance.reap import Reap
from shear_passes.importance.statistics import CalibrationStatistics, ReadStatistics
from shear_passes.importance.taylor import Taylor

__all__ = [
    "CRITERIA", "DEFAULT_WITH_DATA", "HARMLESS", "BlockInfluence", "Bonsai", "Calibration",
    "CalibrationStatistics", "Custom", "Data", "Evidence", "Flap", "Importance", "LoraGuided", "Magnitude", "MiniLlm",
    "Minitron", "Order", "Random", "ReadStatistics", "Reap", "Scores", "Statistic", "Taylor", "Wanda", "as_criterion",
    "blind_costs", "collect", "criterion", "default",
]  # fmt: skip
