"""Latency: what a forward pass takes here, and the share of the parameters whose removal saves a share of that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shear_backends.verify.numbers import evaluation
from shear_ir.errors import OutOfReach, PlanError, TooLittle
from shear_ir.frontend.feeds import tensors_in
from shear_ir.frontend.inputs import Inputs, device_of
from shear_ir.plans import Plan
from shear_passes.importance.calibration import call

ROUNDS = 7
"""Passes of each model, in turns, of which the median counts; one more warms up."""

TRIALS = 6

Clock = Callable[[], float]


@dataclass(frozen=True)
class LatencyTrial:
    """A plan and what it brought: seconds of all feeds, dense and sheared, at a ``share`` of the parameters."""

    plan: Plan
    share: float
    dense: float
    sheared: float

    @property
    def gone(self) -> float:
        """The share of the latency that is gone; less than 0 where the smaller model is slower."""
        return 1.0 - self.sheared / self.dense


def seconds(models: Sequence[nn.Module], feeds: Sequence[Inputs], clock: Clock | None = None) -> list[float]:
    """The median time of a forward pass over all ``feeds`` of each model, measured in turns against each other."""
    clock = clock or time.perf_counter
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS + 1):
        for place, model in enumerate(models):
            with evaluation(model), torch.no_grad():
                _wait(model)
                started = clock()
                for feed in feeds:
                    call(model, feed)
                _wait(model)
                taken[place].append(clock() - started)
    return [statistics.median(each[1:]) for each in taken]


def by_latency(
    ratio: float, planned: Callable[[float], Plan], sheared: Callable[[Plan], nn.Module], model: nn.Module,
    feeds: Sequence[Inputs], clock: Clock | None = None,
) -> LatencyTrial:  # fmt: skip
    """The plan that saves the share of the latency nearest to ``ratio``, by bisection over the share of parameters.

    ``planned``: the plan for a share of the parameters; ``sheared``: the model it leaves. Raises ``PlanError`` when no
    share within reach saves as much.
    """
    if not 0.0 < ratio < 1.0:
        raise PlanError(f"ratio is a share of the latency between 0 and 1, not {ratio}")
    low, high, share = 0.0, 1.0, ratio
    found: list[LatencyTrial] = []
    limit: PlanError | None = None
    for _ in range(TRIALS):
        try:
            plan = planned(share)
            dense, small = seconds([model, sheared(plan)], feeds, clock)
            found.append(LatencyTrial(plan, share, dense, small))
            enough = found[-1].gone >= ratio
        except OutOfReach as failure:
            limit, enough = failure, True
        except TooLittle:
            enough = False
        low, high = (low, share) if enough else (share, high)
        share = (low + high) / 2
    if not found:
        raise limit or PlanError(f"a ratio of {ratio} of the latency removes nothing: one unit in every layer is more")
    best = min(found, key=lambda m: abs(m.gone - ratio))
    if all(m.gone < ratio for m in found) and ratio - best.gone > 0.02:
        raise OutOfReach(
            f"a ratio of {ratio} of the latency cannot be reached: the most that went in {len(found)} measurements is "
            f"{best.gone:.2f}, at {best.share:.2f} of the parameters"
        )
    return best


def as_options(
    measured: LatencyTrial, ratio: float, feeds: Sequence[Inputs], from_data: bool, model: nn.Module
) -> Plan:
    """The plan, which says what was asked for and what was measured where."""
    shapes = [list(next(iter(tensors_in(feed).values())).shape) for feed in feeds]
    told: dict[str, Any] = {
        "dense_ms": round(1000 * measured.dense, 4), "sheared_ms": round(1000 * measured.sheared, 4),
        "gone": round(measured.gone, 4), "of_parameters": round(measured.share, 6), "inputs": shapes,
        "from": "data" if from_data else "example inputs", "device": str(device_of(model)),
        "threads": torch.get_num_threads(), "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    asked = {**measured.plan.options, "budget": "latency", "ratio": ratio, "latency": told}
    return replace(measured.plan, options=asked)


def _wait(model: nn.Module) -> None:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
