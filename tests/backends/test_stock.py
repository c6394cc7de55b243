"""Which config says the sizes that a plan leaves: the fewest fields, all kinds asked before anything is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.module.config_inference import ConfigInference, infer_config
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.rewrite.cuts import build_plan, masks_of
from shear_passes.rewrite.rescale_norm import norm_fixes

LLAMA: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3], "original_max_position_embeddings": 32, "factor": 2.0,
}  # fmt: skip


_programs: dict[nn.Module, Program] = {}


def _program(model: nn.Module) -> Program:
    if model not in _programs:
        _programs[model] = sir.trace(model.eval())
    return _programs[model]


def _asked(model: nn.Module, *kinds: str, ratio: float = 0.2, **how: Any) -> Plan:
    return sir.plan(_program(model), ratio=ratio, kinds=kinds, importance="magnitude", **how)


def _inferred(model: nn.Module, plan: Plan) -> ConfigInference:
    groups = sir.groups(_program(model))
    masks = masks_of(groups, plan.cuts)
    return infer_config(model, groups, masks, plan.kept, tuple(norm_fixes(groups, masks)))


def _sizes(plan: Plan) -> dict[str, set[int]]:
    return {kind: {len(c.kept) for c in plan.cuts if c.kind == kind} for kind in {c.kind for c in plan.cuts}}


def _alike(**config: Any) -> dict[str, Any]:
    """The llama's sizes, its special tokens left out where another class has its own names for them."""
    return {**LLAMA, **config}


def _twins() -> Iterator[Any]:
    """Models in which a number that is no size equals a width, the kinds to cut, and the fields that may change."""
    wide = {"ffn": {"intermediate_size"}, "residual": {"hidden_size"}}
    heads = {"num_attention_heads", "num_key_value_heads", "head_dim"}
    yield (
        "llama, positions as ffn",
        hf.LlamaForCausalLM(hf.LlamaConfig(**_alike(max_position_embeddings=40, vocab_size=40))),
        "ffn",
        wide["ffn"],
    )
    yield (
        "llama, positions as hidden",
        hf.LlamaForCausalLM(hf.LlamaConfig(**_alike(max_position_embeddings=48))),
        "residual",
        wide["residual"],
    )
    yield (
        "mistral, window as ffn",
        hf.MistralForCausalLM(hf.MistralConfig(**_alike(sliding_window=40, head_dim=8))),
        "ffn",
        wide["ffn"],
    )
    yield (
        "mistral, window as hidden",
        hf.MistralForCausalLM(hf.MistralConfig(**_alike(sliding_window=48, head_dim=8))),
        "residual",
        wide["residual"],
    )
    window = {"use_sliding_window": True, "max_window_layers": 3, "num_hidden_layers": 4}
    yield (
        "qwen2, window as ffn",
        hf.Qwen2ForCausalLM(hf.Qwen2Config(**_alike(**window, sliding_window=40))),
        "ffn",
        wide["ffn"],
    )
    yield (
        "qwen2, layers with windows as heads",
        hf.Qwen2ForCausalLM(hf.Qwen2Config(**_alike(**window, sliding_window=6))),
        "kv_head",
        heads,
    )
    yield (
        "gemma2, window as heads",
        hf.Gemma2ForCausalLM(hf.Gemma2Config(**_alike(sliding_window=6, head_dim=12, query_pre_attn_scalar=6))),
        "kv_head",
        heads,
    )
    yield (
        "mixtral, window as ffn",
        hf.MixtralForCausalLM(hf.MixtralConfig(**_alike(sliding_window=20, intermediate_size=20, num_local_experts=4))),
        "ffn",
        wide["ffn"],
    )
    gpt2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    yield (
        "gpt2, positions as inner",
        hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, n_inner=40, n_positions=40, vocab_size=40)),
        "ffn",
        {"n_inner"},
    )
    yield (
        "gpt2, positions as four times hidden",
        hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, n_positions=96, vocab_size=97)),
        "ffn",
        {"n_inner"},
    )
    bert = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    yield (
        "bert, words and positions as ffn",
        hf.BertForMaskedLM(hf.BertConfig(**bert, vocab_size=40, max_position_embeddings=40)),
        "ffn",
        wide["ffn"],
    )
    t5 = {
        "d_model": 24,
        "d_ff": 40,
        "d_kv": 8,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "vocab_size": 97,
    }
    yield (
        "t5, buckets as ffn",
        hf.T5ForConditionalGeneration(
            hf.T5Config(**t5, relative_attention_num_buckets=40, relative_attention_max_distance=40)
        ),
        "ffn",
        {"d_ff"},
    )
    yield (
        "t5, buckets as heads",
        hf.T5ForConditionalGeneration(
            hf.T5Config(**t5, relative_attention_num_buckets=4, relative_attention_max_distance=8)
        ),
        "kv_head",
        {"num_heads"},
    )


@pytest.mark.parametrize(("model", "kind", "fields"), [pytest.param(*rest, id=name) for name, *rest in _twins()])
def test_a_number_that_only_looks_like_a_size_never_changes(model: nn.Module, kind: str, fields: set[str]) -> None:
    found = _inferred(model, _asked(model, kind, ratio=0.15 if kind == "kv_head" else 0.05))
    assert found.config is not None
    assert {path[-1] for path in found.changes} <= fields
    old, new = model.config.to_dict(), found.config.to_dict()
    assert {name for name, value in new.items() if value != old.get(name)} <= {*fields, "rms_norm_eps"}


class OddConfig(hf.PreTrainedConfig):
    """``window`` has to be a multiple of the heads, whatever they are."""

    model_type = "odd"
    heads: int = 6
    ffn: int = 24
    window: int = 24


class Odd(hf.PreTrainedModel):
    """A window that no shape tells, and that may not be changed alone."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        if config.window % config.heads:
            raise ValueError("the window is no multiple of the heads")
        self.up, self.down = nn.Linear(14, config.ffn), nn.Linear(config.ffn, 14)
        self.values, self.out = nn.Linear(14, 5 * config.heads), nn.Linear(5 * config.heads, 14)
        self.window = config.window
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        h = self.values(x[:, -self.window :]).unflatten(-1, (-1, 5)).relu().flatten(-2)
        return self.down(self.up(x[:, -self.window :]).relu()) + self.out(h)


def test_what_cannot_be_changed_alone_is_not_changed_without_need() -> None:
    model, x = Odd(OddConfig()).eval(), torch.randn(2, 9, 14)
    program = sir.trace(model, x)
    groups = {g.size: g for g in sir.groups(program) if g.prunable}
    kept = {groups[24]: np.arange(16), groups[6]: np.arange(4)}
    plan = build_plan(sir.groups(program), sir.analyses(program).get(MeasureCosts()), kept)
    found = infer_config(model, sir.groups(program), masks_of(sir.groups(program), plan.cuts), plan.kept)
    assert dict(found.changes) == {("heads",): 4, ("ffn",): 16}


def test_fields_that_a_class_checks_against_each_other_change_together() -> None:
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA, rope_parameters=dict(LONGROPE)))
    plan = _asked(model, "ffn", "kv_head", ratio=0.15)
    assert _sizes(plan)["kv_head"] == {2}
    found = _inferred(model, plan)
    assert found.config is not None
    assert (found.config.head_dim, found.config.num_attention_heads) == (8, 4)


def test_sizes_that_the_class_refuses_are_avoided_for_every_kind() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    plan = _asked(model, "residual")
    assert _sizes(plan) == {"residual": {36}}  # 38 of 48 would be a fifth, but the six heads do not divide it
    assert plan.notes[0].startswith(
        "36 of 48 residual units stay, not 38, so that a stock config can say it (The hidden"
    )
    small = sir.shear(model, plan)
    assert small.shear_record.stock
    assert small.config.hidden_size == 36
    assert _sizes(_asked(model, "residual", stock=False)) == {"residual": {38}}


def test_the_other_kinds_make_up_for_it() -> None:
    plan = _asked(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), "residual", "ffn", ratio=0.15)
    assert _sizes(plan)["residual"] == {42}
    assert plan.ratio == pytest.approx(0.15, abs=0.01)


def test_what_no_field_tells_is_said_with_what_would_be_stock() -> None:
    bert = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    model = hf.BertForMaskedLM(hf.BertConfig(**bert, vocab_size=97, max_position_embeddings=64))
    plan = _asked(model, "ffn", "kv_head")
    assert plan.notes == (
        "stock classes cannot load this (no config of BertForMaskedLM has these sizes); "
        f"they could with {_only(_asked(model, 'ffn'), 'ffn')} of 40 ffn units, 6 of 6 kv_head units",
    )
    assert _asked(model, "ffn").notes == ()


def _only(plan: Plan, kind: str) -> int:
    (count,) = _sizes(plan)[kind]
    return count


def test_tied_embeddings_are_stock_in_a_narrower_stream() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_alike(tie_word_embeddings=True, head_dim=10)))
    plan = _asked(model, "residual", round_to=6)
    small = sir.shear(model, plan)
    assert small.shear_record.stock
    assert small.lm_head.weight is small.model.embed_tokens.weight
    sir.verify(model, small, plan).raise_if_unsound()


def test_a_buffer_that_the_config_computes_is_not_stock_when_it_is_cut() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_alike(head_dim=16)))
    found = _inferred(model, _asked(model, "rotary_pair", "head_dim", ratio=0.1, stock=False))
    assert found.config is None
    plan = _asked(model, "rotary_pair", ratio=0.1)
    assert "stock classes cannot load this" in plan.notes[0]


def test_notes_are_kept_with_the_plan() -> None:
    plan = _asked(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), "residual")
    assert Plan.from_json(plan.to_json()).notes == plan.notes


def test_the_reason_that_is_left_is_the_one_that_is_told() -> None:
    # 40 of 48 is refused for the six heads; but no multiple of them is stock either: queries have norms of their own.
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**_alike(head_dim=12)))
    plan = _asked(model, "residual", ratio=0.15)
    assert plan.notes[0].startswith("stock classes cannot load this (norms that become narrower share their eps")
