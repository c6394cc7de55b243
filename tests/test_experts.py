"""Whole experts and their channels go: from the modules, from the graph, and stock transformers loads what is left."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import shear_ir as sir
from shear_ir.plans import Plan
from shear_training.lhspg import LHSPG
from tests.oracle.locality import check_calls
from tests.roads import Traced, outputs, same, trace
from tests.zoo import randomised

_TEXT: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MODEL = {**_TEXT, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 67}
_GQA = {**_MODEL, "num_key_value_heads": 2, "head_dim": 14}
_MLA = {
    **_MODEL, "num_key_value_heads": 4, "q_lora_rank": 22, "kv_lora_rank": 18, "qk_rope_head_dim": 10,
    "qk_nope_head_dim": 6, "v_head_dim": 14,
}  # fmt: skip
EXPERTS, CHANNELS, CHOSEN = 12, 16, 3
_OWN = {"intermediate_size": CHANNELS, "num_experts_per_tok": CHOSEN}
_BESIDE = {"intermediate_size": 44, "moe_intermediate_size": CHANNELS, "num_experts_per_tok": CHOSEN}


def hub(cls: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of transformers."""

    def make() -> nn.Module:
        model_class = getattr(transformers, cls)
        made: nn.Module = model_class(model_class.config_class(**config))
        return made

    return make


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": hub("MixtralForCausalLM", **_GQA | _OWN, num_local_experts=EXPERTS),
    "qwen3_moe": hub("Qwen3MoeForCausalLM", **_GQA | _BESIDE, num_experts=EXPERTS, norm_topk_prob=True),
    # Three groups of experts, of which two are open to each token.
    "deepseek_v3": hub(
        "DeepseekV3ForCausalLM", **_MLA | _BESIDE, n_routed_experts=EXPERTS, n_shared_experts=1, n_group=3,
        topk_group=2, first_k_dense_replace=1,
    ),
    "gpt_oss": hub(
        "GptOssForCausalLM", **_GQA | _OWN, num_local_experts=EXPERTS, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "olmoe": hub("OlmoeForCausalLM", **_GQA | _OWN | {"head_dim": 10}, num_experts=EXPERTS),
}  # fmt: skip


@functools.cache
def family(name: str) -> Traced:
    return trace(randomised(FAMILIES[name]()))


@functools.cache
def quartered(name: str) -> Plan:
    """A quarter of the experts and of the channels of experts is gone."""
    found, draw = family(name), np.random.default_rng(0)
    groups = [*found.able("expert"), *(g for g in found.able("ffn") if g.size == CHANNELS)]
    return found.without({g: draw.permutation(g.size)[: g.size // 4] for g in groups})


@functools.cache
def small(name: str) -> nn.Module:
    return sir.shear(family(name).model, quartered(name))


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_experts_and_their_channels_can_go_in_every_layer(name: str) -> None:
    kinds = [c.kind for c in quartered(name).cuts]
    layers = 1 if name == "deepseek_v3" else 2
    assert kinds.count("expert") == layers
    assert kinds.count("ffn") >= layers


def test_the_modules_compute_what_the_original_does_that_never_routes_to_what_is_gone(name: str) -> None:
    report = sir.verify(family(name).model, small(name), quartered(name))
    assert len(set(report.lengths)) >= 2
    assert report.max_abs_diff <= 1e-5
    assert report.moved > 1e-3


def test_the_graph_computes_what_the_original_does_that_never_routes_to_what_is_gone(name: str) -> None:
    found = family(name)
    report = found.report(found.graph(quartered(name)), quartered(name))
    assert report.max_abs_diff <= 1e-5
    assert report.moved > 1e-3


def test_a_mask_of_zeros_alone_is_another_function(name: str) -> None:
    found = family(name)
    assert not found.report(small(name), replace(quartered(name), routers={})).sound


def test_the_stock_class_loads_fewer_experts(name: str, tmp_path: Path) -> None:
    saved = sir.save(small(name), tmp_path / "out")
    assert saved.stock, saved.note
    stock = type(family(name).model).from_pretrained(saved.path)  # type: ignore[attr-defined]
    stock.set_experts_implementation(family(name).model.get_experts_implementation())  # type: ignore[operator]
    assert same(outputs(stock, family(name).feed), outputs(small(name), family(name).feed))
    # How many are chosen is the model's own matter.
    assert stock.config.num_experts_per_tok == CHOSEN


def test_no_kept_entry_hangs_on_a_removed_expert() -> None:
    found = family("deepseek_v3")
    check_calls(found.model, found.groups.axes, found.groups.zeros, found.feed, rounds=2)


def test_a_plan_of_experts_leaves_as_many_in_every_layer() -> None:
    plan = sir.plan(family("mixtral").program, ratio=0.2, kinds=("expert",), importance="random")
    assert {(c.kind, len(c.kept)) for c in plan.cuts} == {("expert", 9)}
    assert plan.routers == {f"model.layers.{layer}.mlp.gate.weight": 0 for layer in (0, 1)}
    assert Plan.from_json(plan.to_json()).routers == plan.routers


def test_as_many_experts_stay_as_are_chosen() -> None:
    program = family("mixtral").program
    with pytest.raises(sir.PlanError, match=r"at least 3 experts left in every layer, at most 0\.\d+ of the param"):
        sir.plan(program, ratio=0.6, kinds=("expert",), importance="random")
    group = family("mixtral").able("expert")[0]
    with pytest.raises(sir.PlanError, match=r"leaves 2 of the 12 units of e0, .* chooses 3 for every token"):
        family("mixtral").without({group: range(10)})


def test_of_groups_of_experts_the_same_places_go_and_enough_stay_for_a_token() -> None:
    (group,) = family("deepseek_v3").able("expert")
    # Two groups of two each are open to a choice of three.
    assert (group.size, group.least) == (EXPERTS // 3, 2)


def test_products_by_groups_want_channels_in_multiples_and_a_plan_says_so() -> None:
    plan = sir.plan(family("mixtral").program, ratio=0.3, kinds=("ffn",), importance="random")
    assert {len(c.kept) for c in plan.cuts} == {8}
    assert {c.reason for c in plan.cuts} == {
        "least by random; a multiple of 8, as the kernel for products by groups wants"
    }


def test_a_plan_made_in_single_precision_serves_half_precision() -> None:
    plan = sir.plan(family("mixtral").program, ratio=0.3, kinds=("ffn",), importance="random")
    half = copy.deepcopy(family("mixtral").model).to(torch.bfloat16)
    small = sir.shear(half, plan)
    sir.verify(half, small, plan).raise_if_unsound()
    small(torch.tensor([[3, 5, 7]]))


def test_what_no_kernel_of_a_precision_can_run_is_refused_with_a_sentence() -> None:
    found = family("mixtral")
    group = next(g for g in found.able("ffn") if g.size == CHANNELS)
    plan = found.without({group: range(4)})
    assert sir.verify(found.model, sir.shear(found.model, plan), plan).sound
    with pytest.raises(sir.PlanError, match=r"leaves 12 of the 16 channels of ffn0, .* wants a multiple of 8 in this"):
        sir.shear(copy.deepcopy(found.model).to(torch.bfloat16), plan)


def test_a_note_says_what_unlike_numbers_of_experts_break() -> None:
    found = family("mixtral")
    first, second = found.able("expert")
    uneven, even = found.without({first: [0, 1], second: [0]}), found.without({first: [0, 1], second: [3, 5]})
    assert even.notes == ()
    assert uneven.notes == (
        "layers of 12 experts keep from 10 to 11: losses over all routers at once, as output_router_logits=True asks "
        "for, want equal numbers; allocation='uniform' keeps them equal",
    )
    small = sir.shear(found.model, even)
    feed = {**found.feed, "labels": found.feed["input_ids"]}
    assert bool(small(**feed, output_router_logits=True).aux_loss.isfinite())


def test_the_multiple_is_that_of_the_precision_and_of_the_way_experts_are_run() -> None:
    def multiples(dtype: torch.dtype, **how: Any) -> set[int]:
        made = hub("MixtralForCausalLM", **_GQA | _OWN | {"num_hidden_layers": 1} | how, num_local_experts=5)()
        return {g.multiple for g in sir.groups(sir.trace(made.to(dtype))) if g.kind == "ffn"}

    assert multiples(torch.bfloat16) == {8}
    assert multiples(torch.float32, experts_implementation="batched_mm") == {1}


def test_training_cannot_make_an_expert_one_that_is_never_routed_to() -> None:
    found = family("mixtral")
    optimizer = torch.optim.SGD(found.model.parameters(), lr=0.1)
    with pytest.raises(sir.PlanError, match="e0 counts experts: zero weights do not say"):
        LHSPG(optimizer, found.model, found.groups, {"e0": 2})


def test_experts_and_whole_blocks_go_together() -> None:
    found = family("mixtral")
    (block,) = (g for g in found.groups if g.kind == "mlp_block")
    plan = found.without({g: [1, 4] for g in found.able("expert")} | {block: [0]})
    # The router of a block that is gone scores nothing any more.
    assert list(plan.routers) == ["model.layers.1.mlp.gate.weight"]
    assert found.report(found.graph(plan), plan).sound


def test_a_layer_that_fills_a_buffer_for_its_queries_can_go() -> None:
    found = family("deepseek_v3")
    (block,) = (g for g in found.groups if g.kind == "block")
    plan = found.without({block: [1]})
    hook = found.model.get_submodule("model.layers.1").register_forward_hook(lambda module, args, output: args[0])
    expected = outputs(found.model, found.feed)
    hook.remove()
    (logits,), (wanted,) = outputs(found.graph(plan), found.feed), expected
    assert torch.allclose(logits, wanted, atol=1e-5)


def test_latents_of_attention_are_no_channels_of_experts_or_of_an_mlp() -> None:
    sizes = {g.size for g in family("deepseek_v3").groups if g.kind == "ffn"}
    assert sizes == {CHANNELS, _BESIDE["intermediate_size"]}
