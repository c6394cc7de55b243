"""Adapters after their base was cut: kept with everything PEFT notes about them true, merged, or refused by name."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_backends.module.adapted import merged
from shear_ir.frontend.inputs import example_inputs
from tests.peft_models import adapted, lora, some
from tests.roads import outputs, same
from tests.zoo import FAMILIES

QV = ("q_proj", "v_proj")
KINDS = pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        pytest.param("llama_gqa", (*QV, "down_proj"), {}, marks=pytest.mark.thorough),  # DoRA below is more
        pytest.param("llama_gqa", QV, {"use_rslora": True}, marks=pytest.mark.thorough),
        pytest.param(
            "llama_gqa",
            QV,
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
            marks=pytest.mark.thorough,
        ),
        ("llama_gqa", (*QV, "down_proj"), {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ("llama_mqa", ("q_proj", "embed_tokens"), {}),
        ("gpt2", ("c_attn", "c_fc"), {"fan_in_fan_out": True}),
        pytest.param("bert", ("query", "value"), {"bias": "lora_only", "lora_bias": True}, marks=pytest.mark.thorough),
    ],
)


@functools.cache
def base_plan(family: str) -> sir.Plan:
    """A plan of the base, made before there were adapters."""
    return some(FAMILIES[family]())


def stock(model: Any, folder: Path, name: str) -> nn.Module:
    """What transformers and PEFT alone make of a saved base and one of its adapters."""
    base = type(model.get_base_model()).from_pretrained(folder)
    return peft.PeftModel.from_pretrained(base, folder / "adapters" / name)


def noted(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What modules note beside their tensors."""
    names = ("in_features", "out_features", "num_embeddings", "embedding_dim", "nx", "nf", "r", "lora_alpha", "scaling")
    found = {path: {n: v for n in names if (v := vars(m).get(n)) is not None} for path, m in model.named_modules()}
    return {path: values for path, values in found.items() if values}


@KINDS
def test_adapters_follow_a_plan_of_their_base_are_saved_and_merged(
    family: str, targets: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(family, *targets, **options)
    plan = base_plan(family)
    small = sir.shear(model, plan)
    assert type(small) is type(model)
    report = sir.verify(model, small, plan)
    assert report.sound
    assert report.moved > 0.01
    saved = sir.save(small, tmp_path / "out")
    assert saved.stock == family.startswith("llama"), saved.note
    again = sir.load(tmp_path / "out")
    assert same(outputs(again, example_inputs(model)), outputs(small, example_inputs(model)))
    # PEFT made these from the saved configs and the base alone.
    assert noted(again) == noted(small)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    plain = merged(small)
    assert type(plain) is type(model.get_base_model())
    assert not any("lora" in name for name in plain.state_dict())
    assert sir.verify(model, plain, plan).sound
    assert sir.save(plain, tmp_path / "merged").stock == saved.stock
    again = sir.load(tmp_path / "merged")
    assert same(outputs(again, example_inputs(plain)), outputs(plain, example_inputs(plain)))


def test_merged_adapters_leave_a_model_of_the_class_of_their_base(tmp_path: Path) -> None:
    model = adapted("llama_mqa", "q_proj", "embed_tokens")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = sir.shear(model, base_plan("llama_mqa"), merge=True)
    assert type(small) is type(model.get_base_model())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # The embedding is adapted and the head is not, so they are no longer one tensor.
    assert small.lm_head.weight is not small.model.embed_tokens.weight  # type: ignore[union-attr]
    assert sir.save(small, tmp_path / "out").stock


def test_half_precision_is_merged_in_float32() -> None:
    model = adapted(FAMILIES["llama_gqa"]().to(torch.bfloat16), "down_proj")
    plan = base_plan("llama_gqa")
    exact = sir.shear(copy.deepcopy(model).float(), plan, merge=True)
    half = sir.shear(model, plan, merge=True)
    for name, tensor in half.named_parameters():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact.get_parameter(name).to(torch.bfloat16)), name


def test_the_active_adapter_and_the_others_are_cut_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted("llama_gqa", *QV)
    model.add_adapter("other", lora("q_proj", r=4, lora_alpha=5, use_rslora=True))
    model.set_adapter("other")
    plan = some(model.eval())
    small: Any = sir.shear(model, plan)
    assert sir.verify(model, small, plan).sound
    assert sir.save(small, tmp_path / "out").stock
    again: Any = sir.load(tmp_path / "out")
    assert (list(again.peft_config), again.active_adapters) == (["default", "other"], ["other"])
    for name in ("default", "other"):
        for each in (small, again, model):
            each.set_adapter(name)
        assert sir.verify(model, small, plan).sound
        assert same(outputs(again, example_inputs(model)), outputs(small, example_inputs(model)))
    assert same(
        outputs(stock(small, tmp_path / "out", "other"), example_inputs(model)), outputs(small, example_inputs(model))
    )


@functools.cache
def ranked(rslora: bool) -> Any:
    """A model whose layers have unlike ranks and alphas; its program is kept with it."""
    options = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": rslora}
    return adapted("llama_gqa", *QV, **options)


@pytest.mark.parametrize(("rslora", "allocation"), [(False, "uniform"), (False, "isomorphic"), (True, "isomorphic")])
def test_cut_ranks_keep_the_scaling_and_are_rebuilt_by_peft(rslora: bool, allocation: str, tmp_path: Path) -> None:
    model = ranked(rslora)
    small: Any = sir.shear(model, some(model, "lora_rank", ratio=0.02, allocation=allocation))
    scalings = {p: m.scaling for p, m in model.named_modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")}
    for path, scaling in scalings.items():
        layer = small.get_submodule(path)
        rank = layer.lora_A["default"].weight.shape[0]
        assert layer.scaling == scaling
        assert layer.r["default"] == rank
        assert layer.lora_alpha["default"] / (math.sqrt(rank) if rslora else rank) == scaling["default"]
    assert sum(layer.r["default"] for layer in map(small.get_submodule, scalings)) < sum(
        layer.r["default"] for layer in map(model.get_submodule, scalings)
    )
    assert sir.save(small, tmp_path / "out").stock
    again = stock(small, tmp_path / "out", "default")
    assert noted(again) == noted(small)
    assert same(outputs(again, example_inputs(model)), outputs(small, example_inputs(model)))


def test_patterns_that_are_still_true_are_left_as_they_were() -> None:
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    small: Any = sir.shear(adapted("llama_gqa", *QV, **patterns), base_plan("llama_gqa"))
    config = small.peft_config["default"]
    assert {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern} == patterns


def test_a_scaling_that_was_set_by_hand_is_what_a_reader_gets(tmp_path: Path) -> None:
    model = adapted("llama_gqa", "q_proj")
    for layer in (m for m in model.modules() if hasattr(m, "set_scale")):
        layer.set_scale("default", 1.5)
    small: Any = sir.shear(model, base_plan("llama_gqa"))
    assert sir.save(small, tmp_path / "out").stock
    assert small.peft_config["default"].lora_alpha == 7 * 1.5


def test_adapters_of_stacked_experts_follow_them() -> None:
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted("mixtral_batched", target_parameters=targets)
    model.add_adapter("other", lora(r=2, target_parameters=targets))
    plan = some(FAMILIES["mixtral_batched"](), "ffn")
    small = sir.shear(model, plan)
    for name in ("default", "other"):
        model.set_adapter(name)
        small.set_adapter(name)  # type: ignore[operator]
        report = sir.verify(model, small, plan)
        assert report.sound
        assert report.moved > 0.01


def test_a_peft_model_on_a_sheared_base_is_saved_and_sheared_again(tmp_path: Path) -> None:
    base = sir.shear(FAMILIES["gpt2"](), base_plan("gpt2"))
    model = adapted(base, "c_attn", fan_in_fan_out=True)
    assert not sir.save(model, tmp_path / "once").stock
    again = sir.load(tmp_path / "once")
    plan = some(again, "ffn", ratio=0.05)
    small = sir.shear(again, plan)
    sir.save(small, tmp_path / "twice")
    assert sir.verify(model, sir.load(tmp_path / "twice"), plan).sound


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is of the method IA3, and only LoRA"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "is of the method LOHA, and only LoRA"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "is of the method ADALORA, and only LoRA"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM"), "is of the method PROMPT_TUNING, and only LoRA"),
        (lora("q_proj", alora_invocation_tokens=[3]), "is the LoRA variant ALoraLinear, and only LoRA and DoRA"),
        (lora("q_proj", trainable_token_indices=[3]), "uses trainable_token_indices, and such"),
        (lora("q_proj", layer_replication=[[0, 2], [1, 2]]), "uses layer_replication, and such"),
    ],
)
def test_other_methods_and_variants_are_refused_by_name(config: peft.PeftConfig, said: str) -> None:
    config.num_virtual_tokens = 3
    model = peft.get_peft_model(FAMILIES["llama_gqa"](), config)  # type: ignore[arg-type]
    for refusing in (lambda: sir.shear(model, base_plan("llama_gqa")), lambda: merged(model)):
        with pytest.raises(sir.ShearError, match=said):
            refusing()


def test_adapters_that_are_merged_at_the_moment_are_refused() -> None:
    model = adapted("llama_gqa", "q_proj")
    model.merge_adapter()
    with pytest.raises(sir.ShearError, match=r"is merged into its base: call unmerge_adapter\(\) first"):
        sir.shear(model, base_plan("llama_gqa"))


def test_there_must_be_adapters_to_merge() -> None:
    with pytest.raises(sir.PlanError, match="there are no adapters to merge"):
        sir.shear(FAMILIES["llama_gqa"](), base_plan("llama_gqa"), merge=True)


def test_a_bias_of_b_without_one_to_merge_into_is_refused() -> None:
    model = adapted("llama_gqa", "q_proj", lora_bias=True)
    with pytest.raises(sir.ShearError, match="the adapters cannot be merged: "):
        sir.shear(model, base_plan("llama_gqa"), merge=True)


def test_a_plan_of_neither_the_model_nor_its_base_is_refused() -> None:
    with pytest.raises(sir.PlanError, match="the plan was made for another model"):
        sir.shear(adapted("llama_mha", "q_proj"), base_plan("llama_gqa"))


def test_saved_adapters_that_were_changed_are_refused(tmp_path: Path) -> None:
    sir.save(sir.shear(adapted("bert", "query"), base_plan("bert")), tmp_path / "out")
    index = tmp_path / "out/adapters/shear_ir_adapters.json"
    text = index.read_text()
    for changed in ("{}", text.replace('"default"', '"../default"'), text.replace('"active"', '"inactive"')):
        index.write_text(changed)
        with pytest.raises(sir.LoadError, match=r"shear_ir_adapters\.json is damaged"):
            sir.load(tmp_path / "out")


def test_nothing_is_left_of_a_save_that_fails_at_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    small = sir.shear(adapted("bert", "query"), base_plan("bert"))
    monkeypatch.setattr("shear_backends.store.adapter.save_file", full)
    with pytest.raises(sir.SaveError, match="No space left on device"):
        sir.save(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
