"""Groups that are named stay whole, and the others make up for them."""

from __future__ import annotations

import pytest

import shear_ir as sir
from shear_ir.errors import PlanError
from tests.roads import trace
from tests.zoo import FAMILIES


def test_a_frozen_group_stays_whole_and_the_ratio_is_met() -> None:
    program = trace(FAMILIES["llama_gqa"]()).program
    free = sir.plan(program, ratio=0.2, kinds=["ffn"])
    plan = sir.plan(program, ratio=0.2, kinds=["ffn"], frozen=["ffn0"])
    assert {c.group for c in plan.cuts} == {"ffn1"}
    assert {c.group for c in free.cuts} == {"ffn0", "ffn1"}
    assert plan.ratio == pytest.approx(free.ratio, abs=0.01)
    assert plan.options["frozen"] == ["ffn0"]


def test_a_frozen_group_that_does_not_exist_is_an_error() -> None:
    program = trace(FAMILIES["llama_gqa"]()).program
    with pytest.raises(PlanError, match="no group ffn7"):
        sir.plan(program, ratio=0.2, frozen=["ffn7"])
