"""Units are the same whatever adapters are attached, and however PEFT was asked for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import peft
import pytest
from torch import nn

import shear_ir as sir
from shear_passes.analysis.find_groups import BLOCK_KINDS, Group, Groups
from tests import roads
from tests.test_lora import of_base
from tests.zoo import FAMILIES, randomised

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

VARIANTS: Mapping[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "none": ("llama_gqa", (), {}),
    "q v": ("llama_gqa", ("q_proj", "v_proj"), {}),
    "q k v gate up": ("llama_gqa", (*ATTENTION, *MLP), {}),
    "and o": ("llama_gqa", (*ATTENTION, "o_proj", *MLP), {}),
    "all seven": ("llama_gqa", (*ATTENTION, "o_proj", *MLP, "down_proj"), {}),
    "and embeddings": ("llama_gqa", (*ATTENTION, "o_proj", *MLP, "down_proj", "embed_tokens"), {}),
    "rsLoRA": ("llama_gqa", ("q_proj", "up_proj"), {"use_rslora": True}),
    "DoRA": ("llama_gqa", ("q_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"), {"use_dora": True}),
    "bias of B": ("qwen2", ("q_proj", "v_proj"), {"lora_bias": True}),
    "all biases": ("qwen2", ("q_proj", "v_proj"), {"bias": "all"}),
    "patterns": (
        "llama_gqa",
        ("q_proj", "up_proj"),
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "dropout": ("llama_gqa", ("q_proj", "up_proj"), {"lora_dropout": 0.05}),
    "Conv1D": ("gpt2", ("c_attn", "c_proj", "c_fc"), {}),
    "DoRA Conv1D": ("gpt2", ("c_attn", "c_proj", "c_fc"), {"use_dora": True}),
    "experts": ("mixtral", ("q_proj",), {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "batched experts": ("mixtral_batched", (), {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}

ALIKE = ("q v", "q k v gate up", "and o", "all seven", "patterns", "dropout")
"""Parts of another variant, or the same to a plan."""

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*lora_bias")


@functools.cache
def base(family: str) -> Groups:
    return sir.groups(sir.trace(FAMILIES[family]()))


def adapted(variant: str) -> nn.Module:
    family, targets, options = VARIANTS[variant]
    if variant == "none":
        return FAMILIES[family]()
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=list(targets), **options)
    return randomised(peft.get_peft_model(FAMILIES[family](), config))  # type: ignore[arg-type]


def only_adapters(group: Group) -> bool:
    return all("lora_" in name for name in group.parameters)


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=[pytest.mark.thorough] if each in ALIKE else []) for each in VARIANTS]
)
def test_units_are_those_of_the_base_and_the_sheared_graph_is_the_masked_original(variant: str) -> None:
    found = roads.trace(adapted(variant))
    assert of_base(found.groups) == of_base(base(VARIANTS[variant][0]))
    assert {g.kind for g in found.groups if only_adapters(g)} == ({"lora_rank"} if variant != "none" else set())
    able = [g for g in found.groups if g.prunable and g.size > 1]
    plan = found.without({group: roads.units(group, 0.4, seed) for seed, group in enumerate(able)})
    report = found.report(found.graph(plan), plan)
    assert report.sound, report
    assert report.moved > 0.01


def test_a_saved_module_takes_the_place_of_its_original() -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["input_layernorm"])
    model = peft.get_peft_model(FAMILIES["llama_gqa"](), config)  # type: ignore[arg-type]
    groups = sir.groups(sir.trace(model))
    assert prunable_axes(groups) == prunable_axes(base("llama_gqa"))
    (stream,) = (g for g in groups if g.kind == "residual")
    saved = [name for name in stream.parameters if "input_layernorm" in name]
    assert saved
    assert all("modules_to_save" in name for name in saved)
    layers = next(g for g in groups.blocks if g.kind == "block").parameters
    # A layer goes with all that it holds, the original that nothing reads any more as well.
    assert {name.replace("modules_to_save.default", "original_module") for name in saved} < set(layers)
    assert set(saved) < set(layers)


def prunable_axes(groups: Groups) -> dict[str, Any]:
    return {name: found for name, found in of_base(groups).items() if found[2] and found[0] not in BLOCK_KINDS}


def test_ranks_follow_their_pattern() -> None:
    groups = sir.groups(sir.trace(adapted("patterns")))
    assert sorted(g.size for g in groups if g.kind == "lora_rank") == [2, 5, 5, 5]


def test_a_second_adapter_changes_no_unit() -> None:
    config = peft.LoraConfig(r=5, target_modules=["q_proj"])
    model = peft.get_peft_model(FAMILIES["llama_gqa"](), config)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    groups = sir.groups(sir.trace(randomised(model)))
    assert of_base(groups) == of_base(base("llama_gqa"))
    assert sorted(g.size for g in groups if g.kind == "lora_rank") == [3, 3, 3, 3, 5, 5]
