"""Layers that go: those that stay close up, and what counts them, modules and config, follows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shear_backends.module.layers import drop_layers, moved, staying, stays
from shear_ir.errors import ShearingError


def llama() -> Any:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
                         num_key_value_heads=1)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_lists_that_lose_layers_say_which_stay() -> None:
    assert staying(llama(), ["model.layers.1", "model.layers.2"]) == {"model.layers": [0, 3]}


def test_what_is_in_no_list_is_refused() -> None:
    with pytest.raises(ShearingError, match=r"model\.norm is in no list of modules"):
        staying(llama(), ["model.norm"])


def test_layers_close_up_with_their_own_weights_and_places() -> None:
    dense = llama()
    small = copy.deepcopy(dense)
    assert drop_layers(small, ["model.layers.1"], dense)
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]
    for place, number in enumerate((0, 2, 3)):
        kept, own = (m.model.layers[n].mlp.up_proj.weight for m, n in ((small, place), (dense, number)))
        assert kept.equal(own)
    assert small.config.num_hidden_layers == 3
    assert (dense.config.num_hidden_layers, len(dense.model.layers)) == (4, 4)


def test_fields_that_list_a_thing_for_each_layer_lose_the_same_places() -> None:
    dense = llama()
    dense.config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    small = copy.deepcopy(dense)
    drop_layers(small, ["model.layers.0"], dense)
    assert small.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_a_plain_sequence_closes_up_too() -> None:
    dense = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    held = nn.ModuleDict({"body": dense})
    small = copy.deepcopy(held)
    drop_layers(small, ["body.1"], held)
    assert [name for name, _ in small["body"].named_children()] == ["0", "1"]
    assert small["body"][1].weight.equal(dense[2].weight)


def test_paths_follow_what_went() -> None:
    gone = ["model.layers.1"]
    assert not stays("model.layers.1.mlp.up_proj", gone)
    assert stays("model.layers.10.mlp.up_proj", gone)
    assert moved("model.layers.3.mlp", gone) == "model.layers.2.mlp"
    assert moved("model.layers.0.mlp", gone) == "model.layers.0.mlp"
    assert moved("model.norm", gone) == "model.norm"
