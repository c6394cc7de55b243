"""What Torch-Pruning 1.6.1 gets wrong on today's transformers, each as a sentence that is true here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.plans import Plan
from tests.roads import Traced, counted, trace, traced
from tests.zoo import FAMILIES, randomised


def checked(family: Traced, plan: Plan) -> nn.Module:
    """The module backend's result, sound in both backends, with as many parameters as the plan says."""
    small = sir.shear(family.model, plan)
    for candidate in (small, sir.shear(family.model, plan, backend="graph")):
        report = sir.verify(family.model, candidate, plan)
        assert report.max_abs_diff <= 1e-5
        assert report.moved > 1e-3
        assert counted(candidate) == plan.after.parameters
    return small


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_whole_kv_groups_go_under_sdpa() -> None:
    """There, keys and values of zero rows were left while the queries stayed."""
    family = traced("llama_gqa")
    assert family.model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    small = shapes(checked(family, sir.plan(family.program, ratio=0.15, kinds=["kv_head"])))
    for layer in ("model.layers.0.self_attn.", "model.layers.1.self_attn."):
        assert small[layer + "k_proj.weight"] == small[layer + "v_proj.weight"] == (6, 32)
        assert small[layer + "q_proj.weight"] == (4 * 6, 32)
        assert small[layer + "o_proj.weight"] == (32, 4 * 6)


def four_kv_heads() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=44, num_attention_heads=8, num_key_value_heads=4, head_dim=6, vocab_size=61,
        num_hidden_layers=2, max_position_embeddings=67,
    )  # fmt: skip
    return randomised(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_the_weakest_kv_units_go_whichever_of_their_slices_is_weak(part: str) -> None:
    """There, scores saw one of the projections and ranked heads by the wrong rows."""
    model = four_kv_heads()
    weak = [1, 2]
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            weight = getattr(layer.self_attn, part).weight
            by_unit = (weight if part != "o_proj" else weight.T).unflatten(0, (4, -1))
            by_unit[weak] *= 1e-3
    family = trace(model)
    plan = sir.plan(family.program, ratio=0.2, kinds=["kv_head"])
    assert [(c.kind, c.removed.tolist()) for c in plan.cuts] == [("kv_head", weak)] * 2
    checked(family, plan)


def test_two_queries_for_each_key_are_planned() -> None:
    """There, this ratio of heads ran without end."""
    family = trace(four_kv_heads())
    assert {(g.kind, g.size) for g in family.groups if g.kind in ("kv_head", "query_group")} == {
        ("kv_head", 4),
        ("query_group", 2),
    }
    checked(family, sir.plan(family.program, ratio=0.3, kinds=["kv_head", "ffn"]))


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", pytest.param("olmo2", marks=pytest.mark.thorough)])
def test_heads_with_normalised_queries_and_keys_really_go(name: str) -> None:
    """There, nothing was removed and nothing was said."""
    family = traced(name)
    before = shapes(family.model)
    plan = sir.plan(family.program, ratio=0.15, kinds=["kv_head"])
    small = shapes(checked(family, plan))
    assert plan.ratio == pytest.approx(0.15, abs=0.06)
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert small[name][0] == before[name][0] // 2


def test_gpt2s_conv1d_shrinks() -> None:
    """There, the transposed weights of Conv1D were passed over."""
    family = traced("gpt2")
    small = shapes(checked(family, sir.plan(family.program, ratio=0.25)))
    assert small["transformer.h.0.attn.c_attn.weight"] == (48, 3 * 36)
    assert small["transformer.h.0.attn.c_proj.weight"] == (36, 48)
    assert small["transformer.h.0.mlp.c_fc.weight"][1] == small["transformer.h.0.mlp.c_proj.weight"][0] < 52


@pytest.mark.parametrize("ratio", [0.2, *(pytest.param(each, marks=pytest.mark.thorough) for each in (0.1, 0.3))])
def test_a_fused_gate_and_up_loses_what_was_asked_once(ratio: float) -> None:
    """There, the two halves were pruned one after the other: twice the ratio."""
    family = traced("phi3")
    plan = sir.plan(family.program, ratio=ratio, kinds=["ffn"])
    small = checked(family, plan)
    assert plan.ratio == pytest.approx(ratio, abs=0.006)
    assert counted(small) == pytest.approx((1 - ratio) * counted(family.model), rel=0.01)
    kept = {c.group: len(c.kept) for c in plan.cuts}
    assert shapes(small)["model.layers.0.mlp.gate_up_proj.weight"][0] == 2 * kept["ffn0"]


class Experts(nn.Module):
    """A mixture whose experts are stacked: ``[experts, ffn, hidden]`` and ``[experts, hidden, ffn]``."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.einsum = einsum
        self.router = nn.Linear(12, 5)
        self.up = nn.Parameter(torch.randn(5, 20, 12))
        self.down = nn.Parameter(torch.randn(5, 12, 20) / 4)
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        if self.einsum:
            inner = torch.relu(torch.einsum("bth,efh->betf", x, self.up))
            out = torch.einsum("betf,ehf,bte->bth", inner, self.down, share)
        else:
            tokens = x.flatten(0, 1).expand(5, -1, -1)
            inner = torch.relu(torch.bmm(tokens, self.up.transpose(1, 2)))
            each = torch.bmm(inner, self.down.transpose(1, 2)).unflatten(1, x.shape[:2])
            out = (each * share.permute(2, 0, 1)[..., None]).sum(0)
        return self.head(x + out)


@pytest.mark.parametrize("einsum", [False, True], ids=["bmm", "einsum"])
def test_the_width_of_stacked_experts_is_not_the_width_of_the_stream(einsum: bool) -> None:
    """There, the two were coupled, and nothing could go."""
    torch.manual_seed(0)
    family = trace(Experts(einsum).eval(), {"x": torch.randn(3, 8, 12)})
    (ffn,) = family.able("ffn")
    assert sorted((s.parameter, s.dim) for s in ffn.slices) == [("down", 2), ("up", 1)]
    plan = sir.plan(family.program, ratio=0.3, kinds=["ffn"])
    small = sir.shear(family.model, plan, inputs=family.feed)
    report = sir.verify(family.model, small, plan, family.feed)
    assert report.sound
    assert report.moved > 0.01
    assert counted(small) == plan.after.parameters
    assert sir.verify(family.model, family.graph(plan), plan, family.feed).sound


@pytest.mark.parametrize("name", ["mixtral", pytest.param("mixtral_batched", marks=pytest.mark.thorough), "olmoe"])
def test_channels_of_transformers_experts_go_together(name: str) -> None:
    family = traced(name)
    (first, _) = family.able("ffn")
    assert sorted((s.parameter.rpartition(".")[2], s.dim) for s in first.slices) == [
        ("down_proj", 2),
        ("gate_up_proj", 1),
    ]
    plan = sir.plan(family.program, ratio=0.2, kinds=["ffn"], round_to=4)
    small = checked(family, plan)
    assert shapes(small)["model.layers.0.mlp.experts.down_proj"][2] == len(plan.cuts[0].kept)


class TestNothingToRemove:
    """There, a request that removes nothing reports success."""

    def test_a_single_kv_head_cannot_go(self) -> None:
        with pytest.raises(sir.PlanError, match="the model has no kv_head groups; it has"):
            sir.plan(traced("llama_mqa").program, ratio=0.2, kinds=["kv_head"])

    def test_a_ratio_below_one_unit_is_an_error(self) -> None:
        with pytest.raises(sir.PlanError, match="removes nothing"):
            sir.plan(traced("llama_gqa").program, ratio=1e-4)

    def test_a_ratio_above_what_can_go_says_what_can(self) -> None:
        with pytest.raises(
            sir.PlanError, match=r"a ratio of 0.9 cannot be reached: .* at most 0\.\d+ of the parameters"
        ):
            sir.plan(traced("llama_gqa").program, ratio=0.9)

    def test_a_pattern_that_matches_nothing_is_an_error(self) -> None:
        with pytest.raises(sir.PlanError, match=r"the pattern 'encoder\.\*' matches no module"):
            sir.plan(traced("llama_gqa").program, ratio=0.2, only=["encoder.*"])

    def test_a_frozen_kind_is_an_error(self) -> None:
        with pytest.raises(sir.PlanError, match="vocab cannot be cut: rows are chosen by the values of the input"):
            sir.plan(traced("llama_gqa").program, ratio=0.2, kinds=["vocab"])

    def test_a_plan_of_another_model_is_an_error(self) -> None:
        plan = sir.plan(traced("llama_gqa").program, ratio=0.2)
        with pytest.raises(sir.PlanError, match="the plan was made for another model"):
            sir.shear(FAMILIES["llama_mha"](), plan)
