"""A budget of measured latency, with a clock that counts the weights which a forward pass reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_backends import latency
from shear_ir.errors import PlanError
from tests import roads


class Clock:
    """Time goes by as linear layers run: a second for every weight."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            self.now += module.weight.numel()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    handle = nn.modules.module.register_module_forward_hook(made.hook)
    monkeypatch.setattr(latency.time, "perf_counter", made)
    yield made
    handle.remove()


def linear(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def test_the_ratio_is_one_of_the_time_that_a_pass_takes(clock: Clock) -> None:
    family = roads.traced("llama_gqa")
    data = [{"input_ids": torch.randint(3, 60, (2, 9))} for _ in range(3)]
    plan = sir.plan(family.program, ratio=0.3, budget="latency", data=data, importance="wanda", kinds=("ffn",))
    small = sir.shear(family.model, plan)
    gone = 1 - linear(small) / linear(family.model)
    assert abs(gone - 0.3) < 0.02
    assert abs(plan.ratio - 0.3) > 0.02  # embeddings take no time
    told = plan.options["latency"]
    assert (plan.options["ratio"], plan.options["budget"], plan.options["importance"]) == (0.3, "latency", "wanda")
    assert (told["dense_ms"], told["gone"]) == (2000.0 * linear(family.model), round(gone, 4))
    assert (told["from"], told["inputs"], told["device"]) == ("data", [[2, 9], [2, 9]], "cpu")


def test_what_no_share_saves_is_refused(clock: Clock) -> None:
    program = roads.traced("llama_gqa").program
    with pytest.raises(PlanError, match=r"a ratio of 0\.9 of the latency cannot be reached: the most that went in"):
        sir.plan(program, ratio=0.9, budget="latency", importance="magnitude")
    with pytest.raises(PlanError, match="a budget of latency needs a ratio"):
        sir.plan(program, budget="latency", blocks=["model.layers.1"])
    with pytest.raises(PlanError, match=r"ratio is a share of the latency between 0 and 1, not 1\.5"):
        sir.plan(program, ratio=1.5, budget="latency", importance="magnitude")


def test_medians_of_turns_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow pass among many is not what a model takes."""
    passes = iter([9.0, 9.0, *[2.0, 1.0] * 3, 50.0, 60.0, *[2.0, 1.0] * 3])
    monkeypatch.setattr(latency, "call", lambda model, feed: None)
    now, begun = 0.0, False

    def clock() -> float:
        nonlocal now, begun
        now += next(passes) if begun else 0.0
        begun = not begun
        return now

    assert latency.seconds([nn.Identity(), nn.Identity()], [{}], clock) == [2.0, 1.0]
