"""Criteria that look at adapters, experts and blocks, and those of the user's own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_passes.analysis.find_groups import BlockGroup, Group
from shear_passes.importance import CRITERIA, BlockInfluence, Custom, Evidence, LoraGuided, Reap, criterion
from shear_passes.importance.block_influence import Ends, StreamTurn, StreamWatch
from shear_passes.importance.calibration import Calibration, Data
from shear_passes.importance.custom import as_criterion
from shear_passes.importance.magnitude import Magnitude
from shear_passes.importance.random import Random
from shear_passes.importance.reap import ExpertStatistics, home
from shear_passes.importance.taylor import Taylor
from tests.calibrated import batches, gradients, manager, of, scores, slices_of, traced
from tests.zoo import build


def adapted() -> peft.PeftModel:
    """Llama with adapters that have learned something, on the MLP alone."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama_gqa"), config)  # type: ignore[arg-type]
    assert isinstance(model, peft.PeftModel)
    return model.eval()


def guided(grads: Any, layer: str, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    of_a, of_b = (grads[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
    return ((of_b @ a + b @ of_a - of_b @ of_a) * (weight + scaling * b @ a)).square()


def test_lora_guided_is_the_gradient_that_adapters_imply() -> None:
    model = adapted()
    data = batches()
    program = sir.trace(model)
    mine = sir.analyses(program)
    mine.put(Data(), Calibration(model, data))
    found = mine.get(LoraGuided(decay=0.7))
    group = next(g for g in sir.groups(program) if g.kind == "ffn" and ".layers.1." in g.module)
    average = torch.zeros(44, dtype=torch.float64)
    for batch in data:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        total = torch.zeros(44, dtype=torch.float64)
        for name in ("up_proj", "down_proj"):
            layer = f"base_model.model.model.layers.1.mlp.{name}"
            module: Any = model.get_submodule(layer)
            factors = [m["default"].weight.detach().double() for m in (module.lora_A, module.lora_B)]
            element = guided(grads, layer, module.base_layer.weight.detach().double(), *factors, 2.0)
            total += element.sum(0 if name == "down_proj" else 1)
        average = 0.7 * average + 0.3 * total
    np.testing.assert_allclose(found[group], average.numpy(), rtol=1e-3)


def test_adapters_count_as_what_they_add_to_the_weights_that_read() -> None:
    model = adapted()
    program = sir.trace(model)
    mine = sir.scores(program, "wanda", "flap", data=batches())
    plain = traced("llama_gqa")[0]
    copy = {n: p.detach().clone() for n, p in plain.named_parameters()}
    merged: Any = model.merge_and_unload()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged.get_parameter(name))
    try:
        wanted = sir.scores(traced("llama_gqa")[1], "wanda", "flap", data=batches())
    finally:
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(copy[name])
    groups = {(g.kind, g.module.removeprefix("base_model.model.")): g for g in sir.groups(program)}
    for group in traced("llama_gqa")[2]:
        if group.kind in ("ffn", "kv_head"):
            for name in mine:
                np.testing.assert_allclose(mine[name][groups[group.kind, group.module]], wanted[name][group], rtol=1e-3)


def test_a_model_without_adapters_gets_some_for_the_time_of_the_pass() -> None:
    model, _, _ = traced("llama_gqa")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = of(scores(LoraGuided(rank=40, decay=0.0), data=batches(1)), "ffn0")
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())
    # B is zero, so the guided gradient is ∇W AᵀA: ranked much as the square of ∇ ⊙ W.
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    (grads,) = gradients(batches(1))
    true = [
        sum(float((grads[n][p] * weights[n][p]).square().sum()) for n, p in slices_of("ffn0", u)) for u in range(44)
    ]
    ranks = [np.argsort(np.argsort(values)) for values in (found, true)]
    assert np.corrcoef(*ranks)[0, 1] > 0.6


def experts(family: str) -> tuple[Any, list[Group]]:
    return manager(family), [g for g in traced(family)[2] if g.kind == "expert"]


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_reap_is_the_mean_of_gate_times_norm_over_the_tokens_of_an_expert(family: str) -> None:
    model, _, _ = traced(family)
    mine, found = experts(family)
    assert len(found) == 2
    path = home(found[0])
    assert path is not None
    calls: list[tuple[Tensor, ...]] = []
    module: Any = model.get_submodule(path)
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
        hook.remove()
        use = found[0].size
        total, count = torch.zeros(use, dtype=torch.float64), torch.zeros(use, dtype=torch.float64)
        for hidden, chosen, gates in calls:
            for token, (ids, weights) in enumerate(zip(chosen, gates, strict=True)):
                for e, gate in zip(ids.tolist(), weights, strict=True):
                    gate_up = module.gate_up_proj[e] @ hidden[token]
                    half = len(gate_up) // 2
                    made = module.down_proj[e] @ (nn.functional.silu(gate_up[:half]) * gate_up[half:])
                    total[e] += float(gate * made.norm())
                    count[e] += 1
    np.testing.assert_allclose(mine.get(Reap())[found[0]], (total / count.clamp_min(1)).numpy(), rtol=1e-4)


def test_experts_that_are_not_gated_as_said_are_not_scored() -> None:
    mine, found = experts("olmoe")
    path = home(found[0])
    assert path is not None
    module = traced("olmoe")[0].get_submodule(path)
    hook = module.register_forward_hook(lambda _, args, output: output + 1.0)
    try:
        assert mine.get(ExpertStatistics())[path].reason == "what its module returns is not the sum of gated experts"
    finally:
        hook.remove()
    with pytest.raises(PlanError, match=r"reap cannot score .* not the sum of gated experts"):
        mine.get(Reap())[found[0]]


def test_reap_scores_experts_alone() -> None:
    with pytest.raises(PlanError, match=r"reap cannot score ffn0 \(ffn\): it is no group of experts"):
        of(scores(Reap()), "ffn0")


def stream(family: str, paths: list[str]) -> list[Tensor]:
    """What modules read, over all batches."""
    model, _, _ = traced(family)
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def look(path: str) -> Any:
        return lambda _, args: seen[path].append(args[0].double().flatten(0, 1))

    hooks = [model.get_submodule(p).register_forward_pre_hook(look(p)) for p in paths]
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen[path]) for path in paths]


def test_block_influence_is_one_less_the_mean_cosine() -> None:
    groups = {g.kind: g for g in traced("llama_gqa")[2] if "block" in g.kind}
    # Each layer's norms read the stream before attention, before the MLP, and before the next layer.
    paths = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")]
    points = stream("llama_gqa", [*paths, "model.norm"])
    turn = [1 - nn.functional.cosine_similarity(a, b, dim=1).mean() for a, b in itertools.pairwise(points)]
    found = scores(BlockInfluence())
    whole = [1 - nn.functional.cosine_similarity(points[i], points[i + 2], dim=1).mean() for i in (0, 2)]
    np.testing.assert_allclose(found[groups["block"]], whole, rtol=1e-5)
    np.testing.assert_allclose(found[groups["attention_block"]], turn[::2], rtol=1e-5)
    np.testing.assert_allclose(found[groups["mlp_block"]], turn[1::2], rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "vit", "t5"])
def test_every_block_that_can_go_has_an_influence(family: str) -> None:
    data: Any = [torch.randn(2, 3, 30, 30)] if family == "vit" else batches()
    data = [{**b, "decoder_input_ids": b["input_ids"][:, :7]} for b in data] if family == "t5" else data
    found = scores(BlockInfluence(), family, data)
    blocks = [g for g in traced(family)[2] if isinstance(g, BlockGroup) and g.prunable]
    assert len(blocks) >= 3
    for group in blocks:
        able = np.array([not unit.reason for unit in group.units])
        assert (found[group][able] > 0).all()
        assert (found[group][able] < 2).all()


def test_a_module_that_several_blocks_run_through_shows_none_of_them() -> None:
    calibration = Calibration(nn.Identity(), [])
    turn, x = StreamTurn(), torch.randn(2, 5, 4)
    watch = StreamWatch(calibration, turn, Ends("norm", ("branch",)))
    for _ in range(2):
        watch.before(nn.Identity(), (x,), {})
    assert turn.broken


def loudest(group: Group, evidence: Evidence) -> Any:
    """The largest thing that each channel's consumers see; heads are not for it."""
    if group.kind != "ffn":
        return None
    return sum(evidence.reads[c].squares for c in evidence.consumers.of(group))


def flat(group: Group, evidence: Evidence) -> Any:
    return np.zeros(3)


class Heaviest(Magnitude):
    """A class of the user's own."""


def test_a_function_is_a_criterion() -> None:
    found = scores(as_criterion(loudest))
    assert of(found, "ffn1").shape == (44,)
    with pytest.raises(
        PlanError, match=r"test_criteria_of_structure:loudest cannot score kv0 \(kv_head\): it gives None"
    ):
        of(found, "kv0")


def test_a_function_that_gives_other_than_a_number_for_each_unit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"flat returns shape \(3,\) for h, which has 32 units"):
        scores(as_criterion(flat))


def test_a_function_that_fails_is_said_to() -> None:
    with pytest.raises(
        PlanError, match=r"the criterion .*<lambda> fails on h \(residual\): ZeroDivisionError: integer division"
    ):
        scores(as_criterion(lambda group, evidence: 1 // 0))
    tens = scores(as_criterion(lambda group, evidence: torch.arange(group.size).bfloat16()))
    assert of(tens, "ffn0").tolist() == list(range(44))


def test_a_criterion_is_found_by_its_import_path(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_own.py").write_text("def flat(group, evidence):\n    return range(group.size)\n")
    monkeypatch.chdir(tmp_path)
    found = criterion("mine_own:flat")
    assert str(found) == "custom{path=mine_own:flat}"
    assert of(scores(found), "ffn0").tolist() == list(range(44))
    assert of(scores(Custom("mine_own:flat")), "ffn0").tolist() == list(range(44))


def test_a_criterion_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "heaviest"

        def load(self) -> Any:
            return Heaviest

    def points(group: str, name: str = "heaviest") -> list[Point]:
        return [Point()] if (group, name) == ("shear_ir.importance", "heaviest") else []

    monkeypatch.setattr("shear_passes.importance.names.entry_points", points)
    assert criterion("heaviest") == Heaviest()
    assert criterion("heaviest{p=1}") == Heaviest(p=1)
    with pytest.raises(PlanError, match="heaviest has no option 'q'; there are p"):
        criterion("heaviest{q=1}")
    with pytest.raises(PlanError, match=r"flat\{q=1\} is no class of criteria whose fields are its options"):
        criterion(f"{__name__}:flat{{q=1}}")
    with pytest.raises(
        PlanError, match=r"no importance criterion 'lightest'; there are .*heaviest.* or package.module:name"
    ):
        criterion("lightest")


def test_names_stand_for_criteria_and_take_options() -> None:
    assert {name: criterion(name) for name in CRITERIA}.keys() == CRITERIA.keys()
    assert criterion("taylor{order=mixed}") == criterion("taylor-mixed") == Taylor(order="mixed")
    assert criterion("random", seed=3) == Random(3)
    assert criterion("random{seed=2}", seed=3) == Random(2)
    with pytest.raises(PlanError, match="dead-code is no importance criterion"):
        criterion("dead-code{}")
    with pytest.raises(PlanError, match="the criterion no_such:thing cannot be imported: No module named 'no_such'"):
        criterion("no_such:thing")
