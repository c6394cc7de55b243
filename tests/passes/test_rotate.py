"""Rotations: another basis, the same function; the units that then go first are those that matter least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import shear_ir as sir
from shear_ir.errors import PlanError
from tests.passes.test_statistics import batches
from tests.zoo import build, randomised


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**b).logits.flatten(0, 1) for b in batches(4, 15)])


def gap(a: nn.Module, b: nn.Module) -> float:
    return float((outputs(a) - outputs(b)).square().mean())


def cut(model: nn.Module, kind: str, ratio: float, step: int = 1, backend: Any = "module") -> nn.Module:
    plan = sir.plan(sir.trace(model), ratio=ratio, kinds=(kind,), importance="order", stock=False, round_to=step)
    small = sir.shear(model, plan, backend=backend)
    sir.verify(model, small, plan).raise_if_unsound()
    return small


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3"])
def test_a_rotated_stream_is_the_same_function(name: str) -> None:
    model = build(name)
    rotated = sir.rotate(model, "residual", data=batches())
    assert torch.allclose(outputs(rotated), outputs(model), atol=1e-4)
    moved = [n for n, p in rotated.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert any("embed_tokens" in n for n in moved)


def test_the_first_directions_of_the_stream_carry_most(tmp_path: Any) -> None:
    model = build("llama_gqa")
    rotated = sir.rotate(model, "residual", data=batches(4, 15))
    small = cut(rotated, "residual", 0.2, step=8)
    assert gap(small, model) < 0.8 * gap(cut(model, "residual", 0.2, step=8), model)
    assert sir.save(small, tmp_path / "small").stock


@pytest.mark.parametrize("kind", [pytest.param("float64", marks=pytest.mark.thorough), "bfloat16"])
def test_tied_embeddings_are_untied_at_a_cost_that_is_said(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, tie_word_embeddings=True,
    ))  # fmt: skip
    model = randomised(model.eval()).to(getattr(torch, kind))
    table = model.lm_head.weight.numel()
    with pytest.warns(UserWarning, match=f"is untied, .* has {table:,} parameters more"):
        rotated: Any = sir.rotate(model, "residual", data=batches())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    assert not rotated.config.tie_word_embeddings
    if kind == "float64":
        assert torch.allclose(outputs(rotated), outputs(model), atol=1e-5, rtol=0)  # its norms compute in fp32
    small = cut(rotated, "residual", 0.3, step=8)
    assert sir.save(small, tmp_path / "small").stock
    loaded = sir.load(tmp_path / "small")
    assert all(torch.equal(t, small.state_dict()[name]) for name, t in loaded.state_dict().items())
    # Where in a file tensors lie decides which kernels run, and so the last place.
    assert torch.allclose(outputs(loaded), outputs(small), rtol=1e-12 if kind == "float64" else 0.02)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bert"])
def test_rotated_heads_are_the_same_function(name: str) -> None:
    model = build(name)
    rotated = sir.rotate(model, "heads")
    assert torch.allclose(outputs(rotated), outputs(model), atol=1e-4)


def test_a_model_in_bfloat16_is_turned_in_float32_and_rounded_once() -> None:
    model = build("llama_gqa").bfloat16()
    rotated = sir.rotate(model, "heads")
    exact = dict(sir.rotate(build("llama_gqa").bfloat16().float(), "heads").named_parameters())
    assert all(torch.equal(p, exact[n].bfloat16()) for n, p in rotated.named_parameters())
    with pytest.raises(PlanError, match="LlamaForCausalLM has only its shapes, no weights: there is nothing to rotate"):
        sir.rotate(model.to("meta"), "heads")


def test_cutting_rotated_heads_is_truncating_the_product_optimally() -> None:
    """Against the Eckart-Young bound, from the singular values of the stacked products of each head."""
    model: Any = build("llama_gqa")
    small = dict(cut(sir.rotate(model, "heads"), "head_dim", 0.02, backend="graph").named_parameters())
    heads, wide = model.config.num_key_value_heads, model.config.num_attention_heads

    def products(tensors: Any, layer: int, dim: int) -> torch.Tensor:
        at = f"model.layers.{layer}.self_attn"
        value = tensors[f"{at}.v_proj.weight"].double().reshape(heads, dim, -1)
        output = tensors[f"{at}.o_proj.weight"].double().reshape(-1, heads, wide // heads, dim)
        return torch.einsum("ohgv,hvi->hgoi", output, value).flatten(1, 2)

    for layer in range(model.config.num_hidden_layers):
        left = small[f"model.layers.{layer}.self_attn.v_proj.weight"].shape[0] // heads
        dense = products(dict(model.named_parameters()), layer, model.config.head_dim)
        lost = (dense - products(small, layer, left)).square().sum((1, 2))
        bound = torch.linalg.svdvals(dense)[:, left:].square().sum(1)
        assert left < model.config.head_dim
        assert torch.allclose(lost, bound, rtol=1e-3)


def test_what_cannot_be_rotated_says_why() -> None:
    with pytest.raises(PlanError, match="layer norms of the residual stream cannot become RMS norms: add at bert"):
        sir.rotate(build("bert"), "residual", data=batches(1))
    with (
        pytest.warns(UserWarning, match="is untied"),
        pytest.raises(PlanError, match="Gemma2ForCausalLM cannot be rotated: something between its products"),
    ):
        sir.rotate(build("gemma2"), "residual", data=batches(1))  # it normalises what it adds to the stream
    with pytest.raises(PlanError, match="MixtralForCausalLM cannot be rotated: something between its products"):
        sir.rotate(build("mixtral"), "residual", data=batches(1))
    with pytest.raises(PlanError, match="there are no values of heads to rotate"):
        sir.rotate(build("bloom"), "heads")  # one axis holds the channels of queries, keys and values
    with pytest.raises(PlanError, match="pass data=batches"):
        sir.rotate(build("llama_gqa"), "residual")
    with pytest.raises(PlanError, match="there is no rotation 'hands'; there are residual and heads"):
        sir.rotate(build("llama_gqa"), "hands")  # type: ignore[arg-type]
