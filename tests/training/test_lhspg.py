"""LHSPG: exactly the asked units become zero, at the right steps, and everything else keeps its function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_backends.verify.numbers import masked
from shear_ir.errors import PlanError
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.rewrite.cuts import build_plan
from shear_training.lhspg import LHSPG
from shear_training.schedule import Periods
from tests.training.tiny import ATTENTION, MLP, adapted, base_groups, groups_of, lhspg, logits, step

TARGETS = {"ffn0": 20, "ffn1": 20, "kv0": 1, "kv1": 1}


@pytest.mark.parametrize("targets", [ATTENTION + MLP, ("q_proj", "v_proj"), ("down_proj", "o_proj"), ("lm_head",)])
def test_zero_units_come_period_by_period_and_stay(targets: tuple[str, ...]) -> None:
    model = adapted(targets=targets)
    optimizer = lhspg(model, {"ffn0": 20, "ffn1": 20}, Periods(warmup=2, count=4, steps=3))
    counts = []
    for _ in range(2 + 4 * 3 + 20):
        step(model, optimizer)
        counts.append(optimizer.zero_units())
    # Ten more at the last step of each period of three.
    assert counts == [min(40, 10 * max(0, (n + 1 - 2) // 3)) for n in range(34)]


def test_a_group_whose_units_matter_least_loses_no_more_than_its_own_count() -> None:
    """Units of earlier periods are taken from the room of their group: the second period goes to the other one."""
    model = adapted()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers.0.mlp" in name and "base_layer" in name:
                weight.mul_(1e-3)
    optimizer = lhspg(model, {"ffn0": 12, "ffn1": 12}, Periods(warmup=0, count=2, steps=2), criteria={"magnitude": 1.0})
    assert optimizer.units is not None
    split = optimizer.units.groups[0].size
    counts = []
    for _ in range(4):
        step(model, optimizer)
        counts.append([int((optimizer.status[part] > 0).sum()) for part in (slice(0, split), slice(split, None))])
    assert counts[0] == [12, 0]  # else the test shows nothing: all of the first period comes from one group
    assert counts[-1] == [12, 12]


def test_one_period_of_one_step_is_the_merged_model_without_the_units() -> None:
    model = adapted(init_lora_weights=False)
    dense = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    optimizer = lhspg(model, TARGETS, Periods(warmup=0, count=1, steps=1), lr=0.0)
    step(model, optimizer)
    assert optimizer.zero_units() == optimizer.total_units == 42
    reference = masked(dense, _plan(dense, optimizer).kept)
    for length in (12, 33):
        assert float((logits(model, length) - logits(reference, length)).abs().max()) <= 1e-5
    assert all(not b.any() for name, b in model.named_parameters() if "lora_B" in name)


def test_the_groups_of_the_adapted_model_do_as_well() -> None:
    model, other = adapted(), adapted()
    optimizer = lhspg(model, TARGETS, Periods(0, 1, 2))
    again = LHSPG(
        torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2),
        other,
        groups_of(other),
        TARGETS,
        Periods(0, 1, 2),
    )
    for _ in range(3):
        step(model, optimizer)
        step(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_zero_units_of_a_trained_model_can_be_sheared_away() -> None:
    model = adapted(targets=("q_proj", "v_proj", "up_proj"))
    optimizer = lhspg(model, TARGETS, Periods(warmup=1, count=2, steps=2))
    for _ in range(6):
        step(model, optimizer)
    expected = logits(model, 33)
    merged = model.merge_and_unload()  # type: ignore[operator]
    small = sir.shear(merged, _plan(merged, optimizer))
    assert float((logits(small, 33) - expected).abs().max()) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in merged.parameters())


def test_base_tensors_of_important_units_change_only_at_merges() -> None:
    model = adapted()
    optimizer = lhspg(model, {"ffn0": 8, "kv1": 1}, Periods(warmup=2, count=2, steps=3))
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    weight = dict(model.named_parameters())[name]
    at = [p for p in optimizer.units.places if p.name == name][0]  # type: ignore[union-attr]  # noqa: RUF015
    for number in range(10):
        before = weight.detach().clone()
        step(model, optimizer)
        important = ~optimizer.redundant[at.owner]
        same = torch.equal(weight[important], before[important])
        assert same == (number not in (4, 7)), number


def test_units_without_an_adapter_shrink_in_equal_steps_to_zero() -> None:
    model = adapted(targets=("q_proj", "v_proj"))
    optimizer = lhspg(model, {"ffn0": 5}, Periods(warmup=1, count=1, steps=5))
    norms = []
    for _ in range(6):
        step(model, optimizer)
        assert optimizer.units is not None
        norms.append(optimizer.units.squares()[optimizer.redundant].sqrt())
    for taken in range(1, 6):
        torch.testing.assert_close(norms[taken], norms[0] * (1 - taken / 5))
    assert not norms[5].any()


def test_keys_of_redundant_heads_end_at_zero_though_they_have_no_adapter() -> None:
    model = adapted(targets=("q_proj", "v_proj"))
    optimizer = lhspg(model, {"kv0": 1}, Periods(warmup=1, count=1, steps=3))
    for _ in range(4):
        step(model, optimizer)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn")
    rows = layer.k_proj.weight.unflatten(0, (2, 6))  # type: ignore[union-attr, operator]
    assert [bool(head.any()) for head in rows] in ([True, False], [False, True])


def test_factors_of_redundant_units_are_zero_at_every_step_and_their_moments_once_they_are_gone() -> None:
    model = adapted()
    optimizer = lhspg(model, {"ffn1": 9}, Periods(warmup=2, count=1, steps=4))
    up = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    down = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    for number in range(9):
        step(model, optimizer)
        if number >= 2:
            gone = optimizer.redundant
            b, a = up.lora_B.default.weight, down.lora_A.default.weight  # type: ignore[union-attr]
            assert not b[gone].any()
            assert not a[:, gone].any()
            moments = [optimizer.state[b]["exp_avg"][gone], optimizer.state[a]["exp_avg"][:, gone]]
            assert [bool(m.any()) for m in moments] == [number < 5, number < 5]
            assert optimizer.state[a]["exp_avg"][:, ~gone].any()


def test_redundant_units_learn_at_the_rate_of_the_optimizer() -> None:
    model = adapted(targets=("up_proj", "down_proj"))
    inside = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.5, 0.999))
    optimizer = LHSPG(inside, model, base_groups(), {"ffn0": 9}, Periods(warmup=40, count=1, steps=6))
    up = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    weight, a = up.base_layer.weight, up.lora_A.default.weight  # type: ignore[union-attr]
    for number in range(45):
        for parameter in inside.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        before = weight.detach().clone()
        optimizer.step()
        if number > 40:  # the first step of the period folds what the warm-up has learned, too
            rows = optimizer.redundant.nonzero().flatten()
            stays = 1 - 1 / optimizer.periods.left(number)
            # Under a gradient that stays the same, Adam's step is as long as its rate; B was zero before it.
            expected = stays * before[rows] - 1e-3 * 2.0 * a.detach().sum(0)
            torch.testing.assert_close(weight[rows], expected, rtol=1e-4, atol=1e-6)


def test_a_merge_begins_the_optimizer_of_b_anew() -> None:
    model = adapted(targets=("gate_proj", "up_proj"))
    inside = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.5, 0.999))
    optimizer = LHSPG(inside, model, base_groups(), {"ffn0": 20, "ffn1": 20}, Periods(warmup=1, count=1, steps=24))
    for _ in range(1 + 24):
        step(model, optimizer)
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert not any(b.any() for b in factors)
    step(model, optimizer)
    # Adam's first step is as long as its rate; young moments under an old count would make it some two times longer.
    assert max(float(b.abs().max()) for b in factors) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("total", "periods", "ends"),
    [(7, Periods(1, 3, 2), [2, 4, 7]), (7, Periods(0, 1, 1), [7]), (3, Periods(0, 5, 1), [0, 0, 0, 0, 3])],
)
def test_the_remainder_goes_to_the_last_period(total: int, periods: Periods, ends: list[int]) -> None:
    model = adapted()
    optimizer = lhspg(model, {"ffn0": total}, periods)
    found = []
    for number in range(periods.total):
        step(model, optimizer)
        if number >= periods.warmup and periods.left(number) == 1:
            found.append(optimizer.zero_units())
    assert found == ends


def test_without_units_to_remove_it_is_the_optimizer_inside() -> None:
    first, second = adapted(), adapted()
    plain = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=1e-2)
    optimizer = lhspg(first, {"ffn0": 0}, Periods(0, 1, 1))
    for _ in range(3):
        step(first, optimizer)
        step(second, plain)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert optimizer.finished


def test_a_half_space_of_nine_tenths_zeroes_nine_steps_early() -> None:
    model = adapted(targets=("q_proj",))
    optimizer = lhspg(model, {"ffn0": 6}, Periods(warmup=0, count=1, steps=30, eps=0.9))
    zero = []
    for _ in range(30):
        step(model, optimizer)
        zero.append(optimizer.zero_units())
    first = zero.index(6)
    # With decay alone, what is left of the last step's norm is 1 - 1/left, which falls below 0.9 at 9 steps left.
    assert zero[:first] == [0] * first
    assert 30 - first == 9


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 11])
def test_a_run_resumed_in_the_middle_ends_bit_identical(stop: int) -> None:
    periods = Periods(warmup=2, count=3, steps=3)

    def run(steps: range, model: nn.Module, optimizer: LHSPG) -> None:
        for _ in steps:
            step(model, optimizer)

    whole, first = adapted(), adapted()
    optimizer = lhspg(whole, TARGETS, periods)
    run(range(13), whole, optimizer)
    broken = lhspg(first, TARGETS, periods)
    run(range(stop), first, broken)
    adapters = {n: p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    base = {n: t.detach().clone() for n, t in broken.base_tensors().items()}
    state = copy.deepcopy(broken.state_dict())

    again = adapted()
    again.load_state_dict({**adapters, **base}, strict=False)
    resumed = lhspg(again, TARGETS, periods)
    resumed.load_state_dict(state)
    run(range(stop, 13), again, resumed)
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(optimizer.status, resumed.status)


def test_a_state_of_another_run_is_refused() -> None:
    model = adapted()
    state = lhspg(model, {"ffn0": 3}, Periods(1, 1, 2)).state_dict()
    with pytest.raises(PlanError, match="another LHSPG run"):
        lhspg(model, {"ffn0": 4}, Periods(1, 1, 2)).load_state_dict(state)


def test_the_weakest_units_go_first() -> None:
    model = adapted()
    planted = torch.tensor([3, 8, 30])
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    with torch.no_grad():
        for part, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            part.base_layer.weight.index_copy_(  # type: ignore[union-attr, operator]
                dim,
                planted,
                1e-3 * part.base_layer.weight.index_select(dim, planted),  # type: ignore[union-attr, operator]
            )
    optimizer = lhspg(model, {"ffn0": 3}, Periods(warmup=0, count=1, steps=2))
    step(model, optimizer)
    assert optimizer.redundant.nonzero().flatten().tolist() == planted.tolist()


def test_units_compete_across_layers_when_asked() -> None:
    model = adapted()
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            part.base_layer.weight.mul_(1e-3)  # type: ignore[union-attr, operator]
    optimizer = lhspg(model, {"ffn0": 25, "ffn1": 25}, Periods(warmup=0, count=1, steps=1), compete=True)
    step(model, optimizer)
    assert optimizer.units is not None
    lost = [int(optimizer.redundant[optimizer.units.of(g)].sum()) for g in optimizer.units.groups]
    assert lost == [7, 43]  # all but one of the weak layer


@pytest.mark.parametrize(
    ("options", "targets", "says"),
    [
        ({"lora_dropout": 0.1}, {"ffn0": 2}, "dropout of 0.1"),
        ({"use_dora": True}, {"ffn0": 2}, "variant DoraLinear"),
        ({}, {"ffn9": 2}, "no group ffn9"),
        ({}, {"ffn0": 44}, "ffn0 has 44 units"),
        ({}, {"ffn0": 0.5}, "whole number"),
        ({}, {"kv0": 1, "ffn0": 1, "q0": 1}, "share elements"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(options: Any, targets: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        lhspg(adapted(**options), targets, Periods(1, 1, 1))


def test_a_packed_base_is_refused() -> None:
    model = adapted()
    groups = groups_of(model)
    weight = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    weight.weight = nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)  # type: ignore[union-attr, operator]
    with pytest.raises(PlanError, match=r"quantised .*torch\.int8"):
        LHSPG(torch.optim.SGD([nn.Parameter(torch.ones(1))]), model, groups, {"ffn0": 1})


def _plan(model: nn.Module, optimizer: LHSPG) -> sir.Plan:
    assert optimizer.units is not None
    found = groups_of(model)
    kept = {found.by_name[g.name]: k for g, k in optimizer.units.kept(optimizer.redundant).items()}
    return build_plan(found, sir.analyses(found.program).get(MeasureCosts()), kept)
