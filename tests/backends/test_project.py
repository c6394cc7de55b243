"""A projected adapter on the sheared base computes what the dense base with the adapter does, masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import shear_ir as sir
from shear_ir.frontend.inputs import example_inputs
from tests.peft_models import adapted, lora, some
from tests.roads import outputs
from tests.zoo import FAMILIES

QV = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("family", "targets", "kinds", "options"),
    [
        ("llama_gqa", (*QV, "down_proj"), ("ffn", "kv_head"), {"rank_pattern": {"v_proj": 3}, "use_rslora": True}),
        ("llama_gqa", (*QV, "down_proj"), ("ffn", "kv_head"), {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ("llama_gqa", ("q_proj", "embed_tokens"), ("residual",), {"modules_to_save": ["norm"]}),
        ("gpt2", ("c_attn", "c_fc", "wte"), ("ffn", "kv_head"), {"fan_in_fan_out": True}),
        ("bert", ("query", "dense"), ("ffn", "kv_head"), {"bias": "all"}),
        ("resnet_hub", ("convolution",), ("conv_channel",), {}),
    ],
)
def test_a_projected_adapter_does_what_it_did_on_the_masked_base(
    family: str, targets: tuple[str, ...], kinds: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    dense: Any = FAMILIES[family]()
    plan = some(dense, *kinds)
    sheared = sir.shear(dense, plan)
    sir.save(sheared, tmp_path / "small")
    model = adapted(dense, *targets, **options)
    model.save_pretrained(tmp_path / "adapter")
    done = sir.project(
        tmp_path / "adapter", plan, tmp_path / "out", base=FAMILIES[family](), sheared=tmp_path / "small"
    )
    assert 0 < done.cut <= done.tensors
    assert done.after < done.before
    assert done.base_digest == sir.base_digest(sheared)
    # PEFT alone, on the sheared base, against the dense base whose removed slices and their adapters' are zero.
    stock = peft.PeftModel.from_pretrained(sir.load(tmp_path / "small"), tmp_path / "out")
    report = sir.verify(model, stock, plan)
    assert report.max_abs_diff <= 1e-5 * max(1.0, report.scale)
    assert report.moved > 0.01
    ours = sir.load(tmp_path / "out")
    feed = example_inputs(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours, feed), outputs(stock.eval(), feed), strict=True))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[sir.Plan, Path]:
    """A plan of a base, and an adapter trained on that base."""
    base = FAMILIES["bert"]()
    plan = some(base)
    adapted(base, "query").save_pretrained(tmp_path / "adapter")
    return plan, tmp_path / "adapter"


def test_the_folders_move_together(trained: tuple[sir.Plan, Path], tmp_path: Path) -> None:
    plan, adapter = trained
    (tmp_path / "here").mkdir()
    sir.save(sir.shear(FAMILIES["bert"](), plan), tmp_path / "here/small")
    sir.project(adapter, plan, tmp_path / "here/out", base=FAMILIES["bert"](), sheared=tmp_path / "here/small")
    (tmp_path / "here").rename(tmp_path / "there")
    assert isinstance(sir.load(tmp_path / "there/out"), peft.PeftModel)


def test_a_projected_adapter_is_refused_on_the_dense_base(trained: tuple[sir.Plan, Path], tmp_path: Path) -> None:
    plan, adapter = trained
    sir.project(adapter, plan, tmp_path / "out", base=FAMILIES["bert"]())
    with pytest.raises(sir.LoadError, match="was made for another base: the shapes of that one have the digest"):
        sir.load_adapter(FAMILIES["bert"](), tmp_path / "out")
    with pytest.raises(sir.LoadError, match="was made for a base of other shapes than this BertForMaskedLM"):
        sir.project(tmp_path / "out", plan, tmp_path / "twice", base=FAMILIES["bert"]())
    assert not (tmp_path / "twice").exists()


def test_a_tensor_too_few_too_many_or_of_another_shape_is_refused(
    trained: tuple[sir.Plan, Path], tmp_path: Path
) -> None:
    plan, adapter = trained
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(iter(whole))
    fewer = {k: t for k, t in whole.items() if k != key}
    for tensors, said in (
        (fewer, "lacks the tensor"),
        ({**whole, "stranger": torch.ones(1)}, "holds the tensor stranger, for which the model has no place"),
        ({**fewer, key: torch.ones(2, 3)}, r"is \[2, 3\], but on this base"),
    ):
        save_file(tensors, file)
        with pytest.raises(sir.LoadError, match=said):
            sir.project(adapter, plan, tmp_path / "out", base=FAMILIES["bert"]())
        assert not (tmp_path / "out").exists()


def test_adapters_of_other_methods_are_refused_by_name(trained: tuple[sir.Plan, Path], tmp_path: Path) -> None:
    plan, _ = trained
    for config, said in (
        (peft.LoHaConfig(target_modules=["query"]), "is of the method LOHA, and only LoRA adapters are sheared"),
        (lora("query", alora_invocation_tokens=[3]), "is the LoRA variant ALoraLinear, and only LoRA and DoRA"),
    ):
        model = peft.get_peft_model(FAMILIES["bert"](), config)  # type: ignore[arg-type]
        model.save_pretrained(str(tmp_path / "other"))
        with pytest.raises(sir.ShearingError, match=said):
            sir.project(tmp_path / "other", plan, tmp_path / "out", base=FAMILIES["bert"]())


def started(start: Any, base: Any, **options: Any) -> Any:
    """A PEFT model whose adapters were trained for a while after they started in some way of PEFT's."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora(*QV, init_lora_weights=start, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("pissa", "PiSSA"),
        ("pissa_niter_4", "PiSSA"),
        ("OLoRA", "OLoRA"),
        ("corda", "CorDA"),
        ("loftq", "LoftQ"),
        ("lora_ga", "LoRA-GA"),
    ],
)
def test_an_adapter_that_changed_its_base_when_it_started_is_refused_by_name(
    start: str, said: str, trained: tuple[sir.Plan, Path], tmp_path: Path
) -> None:
    plan, adapter = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    starts = {"init_lora_weights": start, "loftq_config": {"loftq_bits": 4}}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **starts}))
    with pytest.raises(sir.ShearingError, match=f"started as {said}, which changed the weights of its base, and"):
        sir.project(adapter, plan, tmp_path / "out", base=FAMILIES["bert"]())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "start", ["eva", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("gaussian", "orthogonal"))]
)
def test_an_adapter_that_left_its_base_alone_is_projected_however_it_started(start: str, tmp_path: Path) -> None:
    dense: Any = FAMILIES["llama_gqa"]()
    plan = some(dense)
    sir.save(sir.shear(dense, plan), tmp_path / "small")
    model = started(start, dense)
    model.save_pretrained(tmp_path / "adapter")
    sir.project(tmp_path / "adapter", plan, tmp_path / "out", base=FAMILIES["llama_gqa"](), sheared=tmp_path / "small")
    report = sir.verify(model, sir.load(tmp_path / "out"), plan)
    assert report.max_abs_diff <= 1e-5 * max(1.0, report.scale)


def test_plain_lora_that_peft_made_of_pissa_is_projected(tmp_path: Path) -> None:
    """The way out that the refusal names, with the right outputs: those of the PiSSA model, masked."""
    dense: Any = FAMILIES["llama_gqa"]()
    plan = some(dense)
    sir.save(sir.shear(dense, plan), tmp_path / "small")
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(FAMILIES["llama_gqa"](), lora(*QV, init_lora_weights="pissa"))  # type: ignore[arg-type]
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    feed = example_inputs(dense)
    plain = peft.PeftModel.from_pretrained(FAMILIES["llama_gqa"](), tmp_path / "plain")
    assert torch.allclose(outputs(plain.eval(), feed)[0], outputs(model.eval(), feed)[0], atol=1e-5)
    sir.project(tmp_path / "plain", plan, tmp_path / "out", base=FAMILIES["llama_gqa"](), sheared=tmp_path / "small")
    report = sir.verify(plain, sir.load(tmp_path / "out"), plan)
    assert report.max_abs_diff <= 1e-5 * max(1.0, report.scale)


@pytest.mark.parametrize(
    ("start", "more"),
    [
        ("pissa", {}),
        pytest.param("pissa_niter_4", {}, marks=pytest.mark.thorough),
        pytest.param("olora", {"use_dora": True}, marks=pytest.mark.thorough),
    ],
)
def test_a_model_whose_adapters_changed_its_base_is_sheared_and_saved_as_it_is(
    start: str, more: dict[str, Any], tmp_path: Path
) -> None:
    dense: Any = FAMILIES["llama_gqa"]()
    plan = some(dense)
    model = started(start, dense, **more)
    small = sir.shear(model, plan)
    sir.verify(model, small, plan).raise_if_unsound()
    assert small.peft_config["default"].init_lora_weights is True  # type: ignore[union-attr,index]
    assert model.peft_config["default"].init_lora_weights == start
    assert sir.save(small, tmp_path / "out").stock
    again, feed = sir.load(tmp_path / "out"), example_inputs(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, feed), outputs(small.eval(), feed), strict=True))
    assert json.loads((tmp_path / "out/adapters/default/adapter_config.json").read_text())["init_lora_weights"] is True


@pytest.mark.parametrize(("start", "loads"), [("pissa", True), ("olora", True), ("pissa_niter_4", False)])
def test_a_start_that_peft_cannot_make_again_is_refused_when_its_adapter_is_loaded(
    start: str, loads: bool, tmp_path: Path
) -> None:
    model = started(start, FAMILIES["llama_gqa"]())
    model.save_pretrained(tmp_path)
    feed = example_inputs(model)
    if not loads:
        with pytest.raises(sir.LoadError, match=r"started by changing its base .* that start cannot be made again"):
            sir.load_adapter(FAMILIES["llama_gqa"](), tmp_path)
        return
    again = sir.load_adapter(FAMILIES["llama_gqa"](), tmp_path)
    assert torch.allclose(outputs(again, feed)[0], outputs(model, feed)[0], atol=1e-5)
