"""Plans for a share of the time that a forward pass takes, measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from shear_backends.latency import as_options, by_latency
from shear_ir.errors import PlanError
from shear_ir.frontend.feeds import inputs_of
from shear_ir.frontend.inputs import device_of
from shear_ir.frontend.unchanged import unchanged
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.importance import Importance, Scores
from shear_passes.importance.calibration import as_feed
from shear_tools.api.ask import Ask, Given
from shear_tools.api.pipeline import model_of, shear

MEASURED = 2
"""Batches of data that a budget of latency is measured on."""


@dataclass(frozen=True, eq=False)
class MeasuredScores(Importance):
    """Scores that were measured before, by the criterion ``called``."""

    called: str
    scores: Scores

    def __str__(self) -> str:
        return self.called

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """They are what they were."""
        return self.scores


def plan_latency(program: Program, ask: Ask, given: Given, plan: Callable[[Ask], Plan]) -> Plan:
    """The plan for the share of the parameters that saves ``ask.ratio`` of the latency; ``plan`` makes one of each.

    Raises ``PlanError`` where there are no weights to run.
    """
    model, ratio = model_of(program), ask.ratio
    assert ratio is not None  # Ask sees to it
    if model is None or device_of(model).type == "meta":
        raise PlanError("a budget of latency is measured, and there are no weights to run: trace a model that has them")
    data = cast("Sequence[Any] | None", given.data)
    feeds = [as_feed(model, batch) for batch in data[:MEASURED]] if data else [inputs_of(model)]

    def of_share(share: float) -> Plan:
        return plan(replace(ask, ratio=share))

    with unchanged(model):
        found = by_latency(ratio, of_share, lambda each: shear(model, each), model, feeds)
    return as_options(found, ratio, feeds, bool(data), model)
