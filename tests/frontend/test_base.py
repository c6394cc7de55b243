"""The base within a PEFT model: its names, itself, and the digest that says to which base an adapter belongs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shear_ir as sir
from shear_ir.frontend.base import base_digest, base_view, has_adapters, plain_base
from shear_ir.frontend.load import load_model
from tests.peft_models import adapted
from tests.zoo import build

EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MODELS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("llama_gqa", ("q_proj", "embed_tokens"), {"modules_to_save": ["lm_head"]}),
    ("llama_mqa", ("v_proj",), {}),
    ("gpt2", ("c_attn", "c_fc"), {"fan_in_fan_out": True}),
    ("mixtral_batched", (), EXPERTS),
]


@pytest.mark.parametrize(("family", "targets", "options"), MODELS)
def test_the_base_of_a_peft_model_is_the_model_that_was_adapted(
    family: str, targets: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = build(family)
    digest, tensors = base_digest(model), {n: t.data_ptr() for n, t in model.state_dict().items()}
    assert not has_adapters(model)
    peft_model = adapted(model, *targets, **options)
    assert has_adapters(peft_model)
    assert base_digest(peft_model) == digest
    base = plain_base(peft_model)
    assert not has_adapters(base)
    assert type(base) is type(build(family))
    assert {n: t.data_ptr() for n, t in base.state_dict().items()} == tensors
    assert tensors.keys() <= base_view(peft_model).tensors.keys()


def test_copies_that_adapters_trained_are_named_after_the_original() -> None:
    names = base_view(adapted("llama_gqa", "q_proj", modules_to_save=["lm_head"])).tensors
    root = "base_model.model.lm_head"
    assert names["lm_head.weight"] == (f"{root}.original_module.weight", f"{root}.modules_to_save.default.weight")


def test_the_digest_needs_names_and_shapes_alone() -> None:
    model = build("llama_gqa")
    shapes = {name: "x".join(map(str, t.shape)) for name, t in model.state_dict().items()}
    text = "".join(f"{name}:{shapes[name]}\n" for name in sorted(shapes))
    assert base_digest(model) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_an_adapter_on_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    adapted("llama_gqa", "q_proj").save_pretrained(tmp_path)
    note = {"format": "shear-ir adapter 1", "base_digest": sir.base_digest(build("llama_gqa")), "base": ""}
    (tmp_path / "shear_ir_adapter.json").write_text(json.dumps(note))
    assert has_adapters(sir.load_adapter(build("llama_gqa"), tmp_path))
    with pytest.raises(sir.LoadError, match=r"was made for another base: .* digest [0-9a-f]{16}, those of this Llama"):
        sir.load_adapter(build("llama_mha"), tmp_path)
    (tmp_path / "shear_ir_adapter.json").write_text("{}")
    with pytest.raises(sir.LoadError, match=r"shear_ir_adapter\.json is damaged"):
        sir.load_adapter(build("llama_gqa"), tmp_path)


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    adapted("bert", "query").save_pretrained(tmp_path)
    model: Any = sir.load_adapter(build("bert"), tmp_path)
    again = sir.load_adapter(model, tmp_path, "second")
    assert again is model
    assert (list(model.peft_config), model.active_adapters) == (["default", "second"], ["default"])


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
    ],
)
def test_a_quantised_folder_is_refused(tmp_path: Path, packed: dict[str, Any], said: str) -> None:
    model: Any = build("llama_gqa")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    with pytest.raises(sir.LoadError, match=rf"is quantised \({said}\), and packed weights cannot be cut"):
        load_model(str(tmp_path))


def test_layers_of_a_quantising_library_are_refused() -> None:
    model = build("mlp")
    plan = sir.plan(sir.trace(model), ratio=0.2)
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))).__class__ = kind
    with pytest.raises(sir.PlanError, match=r"quantised parameters \(\w+ is a bitsandbytes\.nn\.modules\.Linear4bit\)"):
        sir.shear(model, plan)
