"""The adapters of a PEFT model by the names of their parameters."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from shear_ir.frontend.adapters import Adapter, find_adapters
from tests.zoo import FAMILIES


def adapters(family: str, *targets: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[Adapter]]:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), init_lora_weights=False, **options)
    model = peft.get_peft_model(FAMILIES[family](), config)  # type: ignore[arg-type]
    return dict(model.named_parameters()), find_adapters(model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("family", "targets"), [("llama_gqa", ("q_proj", "embed_tokens")), ("gpt2", ("c_attn",)), ("bert", ("query",))]
)
def test_an_adapter_names_its_parameters_and_the_dims_they_follow(family: str, targets: tuple[str, ...]) -> None:
    parameters, found = adapters(family, *targets)
    assert len(found) == sum(".lora_" in name for name in parameters) // 2
    for one in found:
        a, b = one.factors
        assert (parameters[one.a], parameters[one.b], parameters[one.base]) == (a, b, one.weight)
        assert one.row_dim is not None
        assert one.column_dim is not None
        assert one.weight.shape[one.row_dim] == b.shape[0]
        assert one.weight.shape[one.column_dim] == a.shape[1]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("family", "target"), [("llama_gqa", "down_proj"), ("gpt2", "c_fc"), ("llama_gqa", "embed_tokens")]
)
def test_the_delta_is_what_peft_would_merge(family: str, target: str) -> None:
    for one in adapters(family, target, use_rslora=True)[1]:
        torch.testing.assert_close(one.delta(), one.layer.get_delta_weight(one.name))


def test_magnitudes_biases_and_variants_are_told() -> None:
    parameters, found = adapters("bert", "query", use_dora=True)
    assert {one.variant for one in found} == {"DoraLinear"}
    assert all(one.magnitude in parameters and one.bias in parameters for one in found)
    parameters, found = adapters("bert", "query", lora_bias=True)
    assert all(one.b_bias in parameters for one in found)


def test_a_model_without_adapters_has_none() -> None:
    assert find_adapters(FAMILIES["llama_gqa"]()) == []
