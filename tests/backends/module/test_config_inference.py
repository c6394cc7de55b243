"""The config of a cut model: the fields that shapes ask for get their new sizes, and no other field changes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import shear_ir as sir
from shear_backends.module.config_inference import ConfigInference, infer_config
from shear_ir.plans import Plan
from shear_passes.rewrite.cuts import checked
from tests.zoo import build


def inferred(model: nn.Module, ratio: float = 0.2, **asked: Any) -> tuple[ConfigInference, Plan]:
    program = sir.trace(model)
    groups = sir.groups(program)
    plan = sir.plan(program, ratio=ratio, importance="order", stock=False, **asked)
    cut = checked(groups, plan)
    return infer_config(model, groups, cut.masks, plan.kept, cut.norms), plan


def changes(found: ConfigInference, model: Any) -> dict[str, Any]:
    before, after = model.config.to_dict(), found.config.to_dict()
    return {name: value for name, value in after.items() if before.get(name) != value}


def test_the_width_of_an_mlp_is_one_field() -> None:
    model = build("llama_gqa")
    found, plan = inferred(model, kinds=("ffn",))
    (left,) = {len(cut.kept) for cut in plan.cuts}
    assert changes(found, model) == {"intermediate_size": left}
    assert found.changes == {("intermediate_size",): left}


def test_heads_are_counted_and_keep_their_width() -> None:
    model: Any = build("llama_gqa")
    found, plan = inferred(model, 0.15, kinds=("kv_head",))
    (left,) = {len(cut.kept) for cut in plan.cuts}
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    assert changes(found, model) == {"num_key_value_heads": left, "num_attention_heads": shared * left}
    assert found.config.head_dim == model.config.head_dim


def test_of_fields_with_one_value_only_the_one_that_was_cut_changes() -> None:
    # Hidden size, MLP width, positions and vocabulary are all 48.
    config = LlamaConfig(vocab_size=48, hidden_size=48, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=48,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    found, plan = inferred(model, kinds=("ffn",))
    assert changes(found, model) == {"intermediate_size": len(plan.cuts[0].kept)}


def test_a_class_without_a_field_for_what_is_left_has_no_config() -> None:
    found, _ = inferred(build("gpt2"), 0.15, kinds=("kv_head",))
    assert found.config is None


def test_layers_that_end_up_uneven_have_no_config() -> None:
    model = build("llama_gqa")
    program = sir.trace(model)
    plan = sir.plan(program, ratio=0.05, kinds=("ffn",), only=("model.layers.0.*",), importance="order", stock=False)
    cut = checked(sir.groups(program), plan)
    assert infer_config(model, sir.groups(program), cut.masks, plan.kept, cut.norms).config is None


@pytest.mark.parametrize("known", [True, False])
def test_changes_that_told_other_sizes_are_tried_first(known: bool) -> None:
    model = build("llama_gqa")
    program = sir.trace(model)
    groups = sir.groups(program)
    plan = sir.plan(program, ratio=0.2, kinds=("ffn",), importance="order", stock=False)
    cut = checked(groups, plan)
    like = {("intermediate_size" if known else "hidden_size",): 7}
    found = infer_config(model, groups, cut.masks, plan.kept, cut.norms, like, searching=False)
    assert (found.config is not None) == known
