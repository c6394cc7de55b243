"""What a model takes, against counting by hand and against what it really keeps."""

from __future__ import annotations

import pytest
import torch

import shear_ir as sir
from tests.zoo import build


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mqa", "gpt2", "gpt_bigcode", "qwen3"])
def test_cache_bytes_are_those_of_the_cache(name: str) -> None:
    model = build(name)
    plan = sir.plan(sir.trace(model), ratio=0.2)
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert plan.before.kv_bytes == kept // 3


def test_flops_of_a_linear_map_are_two_per_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
    plan = sir.plan(sir.trace(model, torch.zeros(7, 5)), ratio=0.2, kinds=["ffn"])
    assert plan.before.flops == 2 * (5 * 9 + 9 * 4)
    assert plan.after.parameters == plan.before.parameters * (1 - plan.ratio)
