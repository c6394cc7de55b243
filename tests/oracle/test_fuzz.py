"""A sample of random programs, and what the oracle does with rules that lie."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from shear_passes.ops import registry
from shear_passes.ops.registry import Entry, Vanish
from tests.oracle.fuzz.check import Seen, check, double
from tests.oracle.fuzz.draft import Choose, Sketch
from tests.oracle.fuzz.programs import draft_program, programs
from tests.oracle.fuzz.shrink import failure_of, shrunk

aten = torch.ops.aten


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(programs(6))
def test_random_programs_are_sound(sketch: Sketch) -> None:
    check(sketch)


def drawn(count: int) -> list[Sketch]:
    with double():
        return [draft_program(Choose(random.Random(seed).randint), 6) for seed in range(count)]


def test_programs_are_unlike_each_other_and_much_of_them_can_go() -> None:
    sketches = drawn(30)
    assert len({sketch.source for sketch in sketches}) == 30
    seen = [check(sketch, seed=1) for sketch in sketches]
    ops = sum((s.ops for s in seen), Counter[str]())
    assert len(ops) > 60
    assert sum(s.prunable for s in seen) > 0.2 * sum(s.groups for s in seen)
    assert sum(s.moved for s in seen) > 0.9 * sum(s.plans for s in seen)
    assert {s.untraced for s in seen} == {""}


def test_a_thorough_check_traces_by_export_and_cuts_the_modules() -> None:
    seen = check(PLAIN, seed=0, thorough=True)
    assert seen.modules == {"cut": 2}
    assert seen.ops == {"aten.linear": 2, "aten.tanh": 2, "aten.relu": 1, "aten.add.Tensor": 1}


PLAIN = Sketch(
    setup=("self.up = nn.Linear(4, 6)", "self.down = nn.Linear(6, 7)"),
    inputs={"x": (3, 4)},
    lines=("v1 = self.up(x)", "v2 = torch.tanh(v1)", "v3 = torch.relu(v2) + torch.tanh(v2)", "v4 = self.down(v3)"),
    returns=("v4",),
)


def lie(monkeypatch: pytest.MonkeyPatch, op: Any, rule: Callable[..., Any], vanish: Vanish) -> None:
    monkeypatch.setitem(registry._RULES, op, Entry(rule, vanish))


def test_a_law_that_promises_zeros_breaks_and_shrinks_to_what_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("v1 = self.up(x)", "v2 = torch.relu(v1)", "v3 = torch.sigmoid(v2)", "v5 = torch.tanh(v2)")
    sketch = replace(PLAIN, lines=(*lines, "v4 = v3.sum(-1)", "v6 = self.down(v5)"), returns=("v4", "v6"))
    assert check(sketch).prunable == 0
    lie(monkeypatch, aten.sigmoid.default, lambda site, x: x, Vanish.FIRST)

    def fails(other: Sketch) -> str:
        return failure_of(lambda: check(other, seed=1))

    small = shrunk(sketch, fails)
    assert fails(small).startswith("Broken: the graph differs from the masked original by ")
    assert small.setup == ("self.up = nn.Linear(4, 6)",)
    assert small.lines == ("v1 = self.up(x)", "v3 = torch.sigmoid(v1)", "v4 = v3.sum(-1)")
    assert small.returns == ("v4",)


def test_a_program_says_what_it_exercised() -> None:
    seen = check(PLAIN, seed=1)
    assert isinstance(seen, Seen)
    assert (seen.groups, seen.prunable) == (3, 1)
    assert seen.frozen == {"dim 1 of the input x": 1, "dim 1 of an output of the model": 1}


CHANCE = Sketch(
    setup=("self.table = nn.Embedding(6, 6)", "self.up = nn.Linear(6, 3)", "self.down = nn.Linear(2, 7)"),
    inputs={"ids": (2, 5)},
    lines=(
        "v1 = self.up(self.table(ids)).softmax(-1)",
        "v2 = torch.where(v1 >= v1.topk(2, -1)[0][..., -1:], v1, 0.0)",
        "v3 = v2 / v2.logcumsumexp(2)",
        "v4 = self.down(v3.index_select(2, torch.tensor([0, 1])))",
    ),
    returns=("v4",),
)
"""Whether its first channel is 0 / 0 hangs on the weights."""


def test_a_program_without_a_value_by_chance_is_counted_and_not_compared() -> None:
    seen = [check(CHANCE, seed=seed) for seed in range(12)]
    assert sum(s.undefined for s in seen) > 0
    assert all(s.undefined < s.plans or s.plans == 1 for s in seen)
