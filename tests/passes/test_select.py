"""Selection: how many units of which group go for a ratio of a budget."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import Group
from shear_passes.importance import Importance, Random
from shear_passes.select import ALLOCATIONS, SelectByKnowledge, SelectGlobal, SelectIsomorphic
from shear_passes.select.by_ratio import BUDGETS
from shear_tools.cli import options
from tests.zoo import build


@cache
def _model() -> Any:
    return build("llama_gqa")


@cache
def _program() -> sir.Program:
    return sir.trace(_model())


def _named(*names: str) -> list[Group]:
    found = sir.groups(_program()).by_name
    return [found[name] for name in names]


def _left(plan: sir.Plan) -> dict[str, int]:
    return {cut.group: len(cut.kept) for cut in plan.cuts}


def test_the_command_line_offers_every_allocation_and_budget() -> None:
    assert get_args(options.Allocation) == tuple(ALLOCATIONS)
    assert get_args(options.BudgetName) == (*BUDGETS, "latency")


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_ratio_is_one_of_the_budget(budget: Any) -> None:
    plan = sir.plan(_program(), ratio=0.3, budget=budget, kinds=("ffn", "query_group", "kv_head"), stock=False)
    gone = 1 - getattr(plan.after, budget) / getattr(plan.before, budget)
    one = 1.0 if budget == "kv_bytes" else 0.06
    assert abs(gone - 0.3) < one / 2 + 0.01
    assert plan.options.get("budget", "parameters") == budget


def test_a_budget_leaves_whole_what_it_does_not_see() -> None:
    plan = sir.plan(_program(), ratio=0.5, budget="kv_bytes", stock=False)
    assert {cut.kind for cut in plan.cuts} == {"kv_head"}
    assert plan.after.kv_bytes * 2 == plan.before.kv_bytes
    with pytest.raises(PlanError, match="no group of the kinds ffn changes the KV bytes per token of this model"):
        sir.plan(_program(), ratio=0.5, budget="kv_bytes", kinds=("ffn",))


def test_what_stays_is_a_multiple_by_kind() -> None:
    plan = sir.plan(_program(), ratio=0.3, round_to={"ffn": 8}, stock=False)
    assert {len(c.kept) % 8 for c in plan.cuts if c.kind == "ffn"} == {0}
    with pytest.raises(PlanError, match="round_to takes a number, or words such as ffn=64, not 'ffn=x'"):
        ALLOCATIONS["uniform"](round_to=("ffn=x",)).step("ffn")


def test_a_floor_stays_in_every_group() -> None:
    with pytest.raises(PlanError, match=r"and 0.9 of every group, at most 0\.\d+ of the parameters can go"):
        sir.plan(_program(), ratio=0.3, floor=0.9)
    plan = sir.plan(_program(), ratio=0.2, floor=0.5, allocation="global", importance=Random(3), kinds=("ffn",))
    assert all(len(c.kept) >= 0.5 * c.size for c in plan.cuts)


def test_heads_that_the_config_accepts_keep_to_the_floor_too() -> None:
    asked = ALLOCATIONS["uniform"](ratio=0.2, floor=0.6, units=("kv_head=1/2",))
    with pytest.raises(PlanError, match="1 kv_head units are fewer than the floor, or no multiple of round_to"):
        asked.counts(sir.analyses(_program()))
    with pytest.raises(PlanError, match="round_to speaks of fnn, but what is cut are the kinds ffn, kv_head"):
        sir.plan(_program(), ratio=0.2, round_to={"fnn": 64})
    with pytest.raises(PlanError, match=r"round_to is a number of units, or one for each of some kinds, not 1\.5"):
        sir.plan(_program(), ratio=0.2, importance="magnitude", round_to=1.5)  # type: ignore[arg-type]


def test_blocks_go_by_the_budget_and_the_floor_as_well() -> None:
    plan = sir.plan(_program(), ratio=0.5, budget="kv_bytes", kinds=("block",))
    assert (plan.after.kv_bytes * 2, plan.options["budget"]) == (plan.before.kv_bytes, "kv_bytes")
    with pytest.raises(PlanError, match=r"and 0\.6 of the blocks left in every list, at most 0\.0 of the parameters"):
        sir.plan(_program(), ratio=0.3, floor=0.6, kinds=("block",))


@pytest.mark.parametrize("allocation", ["global", "isomorphic"])
def test_a_unit_of_infinite_score_stays_and_says_nothing_of_the_others(allocation: str) -> None:
    groups = _named("ffn0", "ffn1")
    draw = np.random.default_rng(3)
    plain = {g: draw.gamma(2.0, 1.0, g.size) for g in groups}
    held = {g: np.concatenate([[np.inf], s[1:]]) for g, s in plain.items()}
    left = ALLOCATIONS[allocation]().wanted(groups, held, _program())
    assert all(abs(left(0.5)[g] - g.size / 2) < 0.2 * g.size for g in groups)
    assert sum(left(0.97).values()) == 3  # of 88: the two that are held, and one more
    assert min(left(0.97).values()) >= 1


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (np.ones(45), r"returns shape \(45,\) for ffn0, which has 44 units"),
        (np.full(44, np.nan), "returns NaN for ffn0"),
        (np.ones(44) * 1j, "returns a ndarray for ffn0, not numbers"),
        (None, "returns a NoneType for ffn0, not numbers"),
    ],
)
def test_a_criterion_has_to_give_a_number_for_each_unit(made: Any, said: str) -> None:
    class Given(Importance):
        def run(self, program: sir.Program, analyses: AnalysisManager) -> Any:
            return dict.fromkeys(_named("ffn0"), made)

    with pytest.raises(PlanError, match=f"given {said}"):
        sir.plan(_program(), ratio=0.2, importance=Given(), kinds=("ffn",))
    with pytest.raises(PlanError, match=r"given gives no scores for kv0 \(kv_head\)"):
        sir.plan(_program(), ratio=0.15, importance=Given(), kinds=("kv_head",))


@pytest.mark.parametrize("allocation", ["global", "isomorphic"])
def test_a_group_of_low_scores_loses_more(allocation: str) -> None:
    groups = _named("ffn0", "ffn1")
    # Of ffn1 all but a few units are far below the mean of their group, of ffn0 none is.
    even = np.linspace(0.9, 1.1, groups[0].size)
    peaked = np.where(np.arange(groups[1].size) < 4, 9.0, np.linspace(0.1, 0.2, groups[1].size))
    wanted = ALLOCATIONS[allocation]().wanted(groups, dict(zip(groups, (even, peaked), strict=True)), _program())
    assert wanted(0.0) == {groups[0]: groups[0].size, groups[1]: groups[1].size}
    assert wanted(1.0) == {groups[0]: 0.0, groups[1]: 0.0}
    if allocation == "isomorphic":
        assert wanted(0.4)[groups[1]] < wanted(0.4)[groups[0]]


def test_global_ranks_standardised_scores_and_counts_parameters() -> None:
    """By brute force: the units in the order of their standard scores, until the parameters are gone."""
    groups = _named("ffn0", "ffn1", "kv0", "kv1")
    generator = np.random.default_rng(0)
    scores = {g: generator.gamma(2.0, 1.0 + i, g.size) for i, g in enumerate(groups)}
    units = sorted(((s - scores[g].mean()) / scores[g].std(), g.name, g) for g in groups for s in scores[g])
    total = sum(g.parameters_per_unit * g.size for g in groups)
    for share in (0.1, 0.37, 0.8):
        spent, left = 0, {g: g.size for g in groups}
        for _, _, g in units:
            spent += g.parameters_per_unit
            if spent > share * total:
                break
            left[g] -= 1
        assert SelectGlobal().wanted(groups, scores, _program())(share) == left


def test_isomorphic_compares_only_groups_of_one_structure() -> None:
    groups = _named("ffn0", "ffn1", "kv0", "kv1")
    scores = {g: np.arange(1.0, g.size + 1) for g in groups}
    left = SelectIsomorphic().wanted(groups, scores, _program())(0.5)
    assert sum(left[g] for g in groups[:2]) == groups[0].size
    assert sum(left[g] for g in groups[2:]) == groups[2].size


def _curves(**curves: Mapping[float, float]) -> tuple[Any, ...]:
    return tuple((name, tuple(curve.items())) for name, curve in curves.items())


def test_knowledge_minimises_the_sum_of_the_deviations() -> None:
    """Against every other way of sharing the same parameters, on a grid."""
    groups = _named("ffn0", "ffn1")
    curves = {"ffn0": {0.25: 0.1, 0.5: 0.3, 0.75: 1.2}, "ffn1": {0.25: 0.3, 0.5: 0.35, 0.75: 0.5}}
    left = SelectByKnowledge(curves=_curves(**curves)).wanted(groups, {}, _program())
    hulls = {"ffn0": ([0, 0.25, 0.5, 0.75], [0, 0.1, 0.3, 1.2]), "ffn1": ([0, 0.75], [0, 0.5])}

    def loss(gone: Mapping[str, float]) -> float:
        return float(sum(np.interp(gone[name], *hulls[name]) for name in gone))

    for share in (0.2, 0.4, 0.6):
        mine = {g.name: 1 - left(share)[g] / g.size for g in groups}
        assert sum(mine.values()) == pytest.approx(2 * share)
        others = [{"ffn0": x, "ffn1": 2 * share - x} for x in np.linspace(0, 0.75, 61) if 0 <= 2 * share - x <= 0.75]
        assert loss(mine) <= min(map(loss, others)) + 1e-9


def test_beyond_what_was_measured_nothing_goes_while_there_is_more_within() -> None:
    groups = _named("ffn0", "ffn1")
    curves = _curves(ffn0={0.5: 0.0}, ffn1={0.5: float("inf")})
    left = SelectByKnowledge(curves=curves).wanted(groups, {}, _program())
    assert [left(0.5)[g] / g.size for g in groups] == pytest.approx([0.5, 0.5])
    assert [left(0.25)[g] / g.size for g in groups] == pytest.approx([0.5, 1.0])


def test_a_plan_by_knowledge_spares_the_sensitive_layer_and_is_sound() -> None:
    curves = {name: {0.5: 9.0 if name.endswith("0") else 0.1} for name in ("ffn0", "ffn1", "kv0", "kv1")}
    plan = sir.plan(_program(), ratio=0.06, allocation="by-knowledge", knowledge=curves)
    assert set(_left(plan)) == {"ffn1"}
    sir.verify(_model(), sir.shear(_model(), plan), plan).raise_if_unsound()
    with pytest.raises(PlanError, match="the knowledge distribution says nothing of kv1"):
        sir.plan(
            _program(), ratio=0.06, allocation="by-knowledge", knowledge={k: c for k, c in curves.items() if k != "kv1"}
        )


def test_an_allocation_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="no allocation 'fair'; there are uniform, global, isomorphic, by-knowledge"):
        sir.plan(_program(), ratio=0.2, allocation="fair")
    with pytest.raises(PlanError, match="by-knowledge needs what the knowledge distribution measured"):
        sir.plan(_program(), ratio=0.2, allocation="by-knowledge")


def test_the_cost_of_now_is_the_budget_s_total() -> None:
    plan = sir.plan(_program(), ratio=0.2)
    assert plan.before == sir.analyses(_program()).get(MeasureCosts()).now


def _convolutions(*channels: int, groups: int = 1) -> sir.Program:
    """Convolutions of 3 channels to each of ``channels`` and then to 5."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1)]
    for before, after in pairwise(channels):
        layers += [nn.ReLU(), nn.Conv2d(before, after, 3, padding=1, groups=groups)]
    return sir.trace(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels[-1], 5, 1)), torch.randn(2, 3, 17, 15))


def test_a_ratio_that_units_are_too_coarse_for_is_missed_with_a_sentence() -> None:
    asked = {"kinds": ("conv_channel",), "importance": "order"}
    program = _convolutions(4, 4, 4)
    plan = sir.plan(program, ratio=0.05, **asked)
    assert plan.ratio == pytest.approx(0.097, abs=1e-4)
    assert plan.notes == (
        "0.097 of the parameters go, not 0.05, for units are coarse: 1 of 4 conv_channel units in 3 groups is 0.35 of them",
    )
    assert not sir.plan(program, ratio=plan.ratio, **asked).notes
    assert Plan.from_json(plan.to_json()).notes == plan.notes
