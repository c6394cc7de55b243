"""Depth: whole layers and parts of them go, in both backends; the reference silences branches by hooks of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.verify import masked_blocks
from shear_backends.verify.numbers import difference
from shear_ir.frontend.export import trace as trace_graph
from shear_ir.frontend.inputs import example_inputs
from shear_ir.plans import Plan, original, renumbered
from shear_ir.program import Program
from shear_passes.analysis.find_groups import BlockGroup
from shear_passes.rewrite import DropBlocks
from tests.roads import Traced, outputs, same, trace
from tests.zoo import _GPT, _GQA, _T5, _WIDE, _hub, randomised

_FOUR = {**_GQA, "num_hidden_layers": 4}
_DEEP = {
    "llama": _hub("LlamaForCausalLM", **_FOUR),
    "gpt2": _hub("GPT2LMHeadModel", **_GPT | {"n_layer": 3}),
    "gemma3": _hub(
        "Gemma3ForCausalLM", **_FOUR, query_pre_attn_scalar=7, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gpt_oss": _hub(
        "GptOssForCausalLM", **_FOUR | {"intermediate_size": 20, "num_experts_per_tok": 3}, num_local_experts=5,
        sliding_window=5, layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_neox": _hub("GPTNeoXForCausalLM", **_WIDE | {"num_hidden_layers": 3}, rotary_pct=0.75),
    "t5": _hub("T5ForConditionalGeneration", **_T5),
    "bert": _hub("BertForMaskedLM", **_WIDE, type_vocab_size=2),
    "vit": _hub(
        "ViTForImageClassification", num_labels=7, image_size=30, patch_size=6, num_hidden_layers=3, hidden_size=40,
        num_attention_heads=5, intermediate_size=52,
    ),
    "resnet": _hub(
        "ResNetForImageClassification", num_labels=7, embedding_size=10, hidden_sizes=[16, 24], depths=[1, 3]
    ),
}  # fmt: skip


@functools.cache
def deep(name: str) -> Traced:
    """A model with some layers, traced once."""
    return trace(randomised(_DEEP[name]()))


def group(family: Traced, kind: str = "block", place: int = -1) -> BlockGroup:
    found = [g for g in family.groups.blocks if g.kind == kind]
    return found[place]


def without(family: Traced, *places: int, kind: str = "block") -> Plan:
    return family.without({group(family, kind): places})


def layers_return_their_input(model: nn.Module, paths: Sequence[str]) -> list[Any]:
    """Hooks by which each module gives back the stream it was given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    return [model.get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path in paths]


def branches_return_zero(model: nn.Module, paths: Sequence[str]) -> list[Any]:
    """Hooks by which each module returns zeros, which is what its sum then adds."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    return [model.get_submodule(path).register_forward_hook(hook) for path in paths]


def hooked(model: nn.Module, hooks: list[Any], feed: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What ``model`` predicts with the hooks, which are then removed."""
    try:
        return outputs(model, feed)
    finally:
        for hook in hooks:
            hook.remove()


GONE = {"llama": (1, 2), "gpt2": (0,), "gemma3": (0, 1), "gpt_oss": (1, 3), "gpt_neox": (1,), "t5": (1,), "vit": (0, 2),
        "resnet": (1,)}  # fmt: skip


@functools.cache
def shallow(name: str) -> tuple[Plan, nn.Module]:
    """The plan that removes the layers above, and the modules it leaves."""
    family = deep(name)
    plan = without(family, *GONE[name])
    return plan, sir.shear(family.model, plan)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.thorough] if place % 2 else []) for place, each in enumerate(GONE)]
)
def test_without_layers_both_backends_compute_what_skipping_them_by_hooks_does(name: str, tmp_path: Path) -> None:
    family = deep(name)
    plan, small = shallow(name)
    graph = family.graph(plan) if name != "llama" else sir.shear(family.model, plan, backend="graph")
    assert sum(p.numel() for p in small.parameters()) == plan.after.parameters < plan.before.parameters
    longer = example_inputs(family.model, batch=2, length=16, seed=1)
    for feed in (family.feed, longer):
        expected = hooked(family.model, layers_return_their_input(family.model, plan.gone), feed)
        assert difference(expected, outputs(small, feed)) <= 1e-5
        assert difference(expected, outputs(family.model, feed)) > 0.05
        if feed is family.feed or name == "llama":  # the others' graphs are of the traced size
            assert difference(expected, outputs(graph, feed)) <= 1e-5
    saved = sir.save(small, tmp_path / "out")
    assert saved.stock, saved.note
    stock = type(family.model).from_pretrained(saved.path).eval()  # type: ignore[attr-defined]
    if name != "gpt_oss":  # how experts are run is kept in no checkpoint
        assert same(outputs(stock, family.feed), outputs(small, family.feed))
    if name == "llama":
        assert sir.verify(family.model, stock, plan).sound


def test_inputs_of_one_size_are_compared_with_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    family = deep("llama")
    plan, small = shallow("llama")
    traced: list[int] = []

    def counted(model: nn.Module, feed: dict[str, Tensor]) -> Program:
        traced.append(feed["input_ids"].shape[1])
        return trace_graph(model, feed)

    monkeypatch.setattr(masked_blocks, "trace", counted)
    feeds = [example_inputs(family.model, length=length, seed=length + seed) for seed in (0, 1) for length in (7, 9)]
    report = sir.verify(family.model, small, plan, feeds)
    assert report.sound
    assert len(report.lengths) == 4
    assert traced == [7, 9]


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gemma3", "gpt_oss"))]
)
def test_generation_with_a_cache_is_greedy_decoding_without_the_layers(name: str) -> None:
    family = deep(name)
    plan, small = shallow(name)
    ids = family.feed["input_ids"].clamp(min=3)
    with torch.no_grad():
        made = small.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None,
            use_cache=True,
        )  # fmt: skip
    for _ in range(6):
        (logits,) = hooked(family.model, layers_return_their_input(family.model, plan.gone), {"input_ids": ids})
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "mlp_block"), ("t5", "attention_block"), ("bert", "attention_block")],
)
def test_a_part_of_a_layer_goes_in_the_graph_alone(name: str, kind: str) -> None:
    family = deep(name)
    plan = without(family, 1, kind=kind)
    assert not plan.gone
    with pytest.raises(sir.ShearingError, match="is a part of what its layer's forward adds up: use the graph backend"):
        sir.shear(family.model, plan)
    small = family.graph(plan)
    path = group(family, kind).units[1].path
    silent = path + ".output.dense" if name == "bert" else path
    expected = hooked(family.model, branches_return_zero(family.model, [silent]), family.feed)
    if name != "bert":  # there a bias of the branch is added behind the module that a hook can silence
        assert difference(expected, outputs(small, family.feed)) <= 1e-5
    report = family.report(small, plan)
    assert report.sound
    assert report.moved > 0.01


def test_a_layer_with_a_norm_after_its_sum_is_frozen_and_its_parts_are_not() -> None:
    family = deep("bert")
    assert not group(family).prunable
    assert "aten.layer_norm changes its stream, so it is more than its blocks" in group(family).reason
    assert group(family, "attention_block").prunable
    with pytest.raises(sir.PlanError, match=r"block cannot be cut: .*layer_norm changes its stream"):
        sir.plan(family.program, ratio=0.3, kinds=("block",))


def test_a_layer_that_makes_what_others_read_is_frozen() -> None:
    family = deep("t5")
    for found in (g for g in family.groups.blocks if g.kind == "block"):
        assert list(found.fixed) == [0]
        assert "is made in it, and" in found.fixed[0]
    with pytest.raises(sir.PlanError, match=r"decoder.block.0 cannot be removed: .* reads it elsewhere"):
        without(family, 0)


def test_of_stages_of_which_one_could_go_the_layers_are_blocks() -> None:
    recipe = _hub("ConvNextForImageClassification", num_labels=7, hidden_sizes=[8, 12, 16, 20], depths=[2, 1, 2, 1])
    groups = sir.groups(sir.trace(recipe()))
    found = [g.module for g in groups.blocks if g.kind == "block" and g.prunable]
    assert found == [f"convnext.encoder.stages.{stage}.layers" for stage in range(4)]


def test_parallel_branches_are_one_block() -> None:
    assert {g.kind for g in deep("gpt_neox").groups.blocks} == {"block"}


def test_what_leaves_a_block_beside_its_sum_freezes_it() -> None:
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList([nn.Linear(10, 14) for _ in range(2)])
            self.down = nn.ModuleList([nn.Linear(14, 10) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            first = torch.tanh(self.up[0](x))
            x = x + self.down[0](first)
            return x + self.down[1](torch.tanh(self.up[1](x)) + first)

    family = trace(randomised(Leaking()))
    reasons = [unit.reason for g in family.groups.blocks for unit in g.units]
    assert "leaves the block" in reasons[0]
    assert not reasons[1]


def test_width_and_depth_go_together() -> None:
    family = deep("llama")
    plan = sir.plan(
        family.program, ratio=0.4, kinds=("block", "ffn", "kv_head"), importance="random", block_importance="magnitude"
    )
    assert {c.kind for c in plan.cuts} == {"block", "ffn", "kv_head"}
    assert abs(plan.ratio - 0.4) < 0.02
    small = sir.shear(family.model, plan)
    assert family.report(small, plan).max_abs_diff <= 1e-5
    assert difference(outputs(family.graph(plan), family.feed), outputs(small, family.feed)) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) == plan.after.parameters
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_what_is_left_is_traced_and_run_at_the_sizes_of_the_whole() -> None:
    # A batch of 5 would be the number of layers, but is free once there are four.
    family = trace(randomised(_hub("LlamaForCausalLM", **_FOUR | {"num_hidden_layers": 5})()))
    narrow = next(g for g in family.able("ffn"))
    plan = family.without({group(family): [1], narrow: [0, 5]})
    assert example_inputs(sir.shear(family.model, plan))["input_ids"].shape != family.feed["input_ids"].shape


def test_the_length_of_a_list_may_say_how_many_layers_there_are(tmp_path: Path) -> None:
    recipe = _hub(
        "NemotronHForCausalLM", vocab_size=61, hidden_size=36, num_attention_heads=3, num_key_value_heads=3,
        head_dim=14, intermediate_size=44, layers_block_type=["mlp", "full_attention", "mlp"],
    )  # fmt: skip
    family = trace(randomised(recipe()))
    small: Any = sir.shear(family.model, family.without({group(family): [0]}))
    assert (small.config.layers_block_type, small.config.num_attention_heads) == (["full_attention", "mlp"], 3)
    assert sir.save(small, tmp_path / "shallow").stock
    # Its config holds an infinite number, which a record keeps.
    uneven = sir.shear(family.model, family.without({family.able("ffn")[0]: [7]}))
    saved = sir.save(uneven, tmp_path / "uneven")
    assert not saved.stock
    assert same(outputs(sir.load(saved.path), family.feed), outputs(uneven, family.feed))


def test_cuts_of_depth_and_width_one_after_the_other_are_one_plan(tmp_path: Path) -> None:
    family = deep("llama")
    first = sir.plan(family.program, blocks=("model.layers.1",))
    once = sir.shear(family.model, first)
    second = sir.plan(sir.trace(once), ratio=0.1, kinds=("ffn",), importance="random", only=("model.layers.[12].*",))
    twice = sir.shear(once, second)
    third = sir.plan(sir.trace(twice), blocks=("model.layers.1",))
    small = sir.shear(twice, third)
    joined = first.then(second).then(third)
    assert joined.gone == ("model.layers.1", "model.layers.2")
    assert family.report(small, joined).sound
    for again in (sir.shear(family.model, joined), family.graph(joined)):
        assert difference(outputs(again, family.feed), outputs(small, family.feed)) <= 1e-5
    loaded = sir.load(sir.save(small, tmp_path / "out").path)
    assert same(outputs(loaded, family.feed), outputs(small, family.feed))


def test_without_data_the_deepest_layers_but_the_last_go_first() -> None:
    plan = sir.plan(deep("llama").program, ratio=0.4, kinds=("block",))
    assert plan.gone == ("model.layers.1", "model.layers.2")
    with pytest.raises(sir.PlanError, match=r"a ratio of 0.9 cannot be reached: .* at most 0\.\d+ of the parameters"):
        sir.plan(deep("llama").program, ratio=0.9, kinds=("block",))


def test_layers_are_named_and_a_name_of_nothing_is_refused() -> None:
    program = deep("llama").program
    assert sir.plan(program, blocks=("*.layers.[03]",)).gone == ("model.layers.0", "model.layers.3")
    with pytest.raises(sir.PlanError, match=r"no block matches 'layers.9'; blocks are named like model.layers.0"):
        sir.plan(program, blocks=("layers.9",))
    with pytest.raises(sir.PlanError, match="say how much goes"):
        sir.plan(program)


def test_an_encoder_and_its_decoder_lose_the_same_share() -> None:
    plan = sir.plan(deep("t5").program, ratio=0.35, kinds=("block",), importance="magnitude")
    assert {c.module: len(c.removed) for c in plan.cuts} == {"encoder.block": 1, "decoder.block": 1}


def test_paths_move_up_and_back() -> None:
    gone = ("a.layers.1", "a.layers.3", "a.layers.4.inner.0")
    assert [renumbered(f"a.layers.{i}.w", gone) for i in range(5)] == ["a.layers.0.w", None, "a.layers.1.w", None,
                                                                       "a.layers.2.w"]  # fmt: skip
    assert renumbered("a.layers.4.inner.1.w", gone) == "a.layers.2.inner.0.w"
    assert original("a.layers.2.inner.0.w", gone) == "a.layers.4.inner.1.w"
    assert original("a.layers.2", gone) == "a.layers.4"


def test_the_pass_drops_blocks_by_name() -> None:
    family = deep("llama")
    result = sir.PassManager(
        [DropBlocks(blocks=("model.layers.2",))]
    ).run(family.program, dict(family.model.named_parameters()))  # fmt: skip
    assert "model.layers.2.mlp.up_proj.weight" in result.program.params
    assert "model.layers.3.mlp.up_proj.weight" not in result.program.params
    assert result.program.digest == sir.trace(sir.shear(family.model, without(family, 2))).digest


def test_units_share_out_what_their_layers_own() -> None:
    found = group(deep("llama"))
    owned = np.concatenate(
        [np.unique(s.index_map[0]) for s in found.slices if s.parameter.startswith("model.layers.2")]
    )
    assert set(owned) == {2}
