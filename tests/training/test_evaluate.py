"""The loss of a model: that of transformers, whatever the padding, the mode and the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_training.data import Source
from shear_training.evaluate import Loss, evaluate, evaluate_sources, require_numbers, require_readable
from shear_training.rows import Rows, stacked
from tests.training.tiny import adapted
from tests.zoo import FAMILIES


def rows(*lengths: int, prompt: int = 0) -> Rows:
    """Random rows; the first ``prompt`` tokens of each do not count."""
    drawn = torch.randint(3, 60, (len(lengths), 13), generator=torch.Generator().manual_seed(3)).tolist()
    marked = [(ids[:n], [i >= prompt for i in range(n)]) for ids, n in zip(drawn, lengths, strict=True)]
    return stacked(marked, 13, 0)


def alone(model: nn.Module, made: Rows) -> Loss:
    """By transformers' own loss, row by row, without padding."""
    total, tokens = 0.0, 0
    for number in range(len(made)):
        batch = made.batch([number])
        counted = int((batch["labels"][:, 1:] >= 0).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * counted
        tokens += counted
    return Loss(total / tokens, tokens)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_padding_and_batches_do_not_change_the_loss(family: str, batch: int) -> None:
    model, made = FAMILIES[family](), rows(13, 5, 9, 2, 7)
    found, expected = evaluate(model, made, batch=batch), alone(model, made)
    assert found.tokens == expected.tokens == 31
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected.nll), rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_has_the_loss_of_the_modules(masked: bool) -> None:
    model, made = FAMILIES["llama_gqa"](), rows(13, 5, 9)
    ids = torch.randint(3, 60, (3, 7))
    inputs = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}
    plan = sir.plan(sir.trace(model, inputs), ratio=0.2, importance="random")
    small, graph = (sir.shear(model, plan, inputs=inputs, backend=name) for name in ("module", "graph"))
    assert evaluate(graph, made).nll == pytest.approx(evaluate(small, made).nll, rel=1e-5)
    require_readable(graph, {"texts": made})


def test_the_prompt_does_not_count() -> None:
    model, made = FAMILIES["llama_gqa"](), rows(13, 9, prompt=4)
    assert evaluate(model, made).tokens == 14
    assert evaluate(model, made).nll == pytest.approx(alone(model, made).nll, rel=1e-5)


def test_adapted_and_sheared_models_are_measured_as_they_are() -> None:
    peft, model, made = adapted(), FAMILIES["llama_gqa"](), rows(13, 9)
    assert evaluate(peft, made).nll == pytest.approx(alone(peft, made).nll, rel=1e-5)
    small = sir.shear(model, sir.plan(sir.trace(model), ratio=0.2))
    assert evaluate(small, made).nll == pytest.approx(alone(small, made).nll, rel=1e-5)


def test_modes_cache_and_gradients_are_as_before() -> None:
    model = adapted(lora_dropout=0.5)
    model.train()
    model.get_submodule("base_model.model.model.norm").eval()
    before = [module.training for module in model.modules()]
    model.config.use_cache = True
    first, second = evaluate(model, rows(13)), evaluate(model, rows(13))
    assert first == second
    assert [module.training for module in model.modules()] == before
    assert (model.config.use_cache, torch.is_grad_enabled()) == (True, True)


def test_bfloat16_is_close() -> None:
    model, made = FAMILIES["llama_gqa"](), rows(13, 9)
    exact, rough = evaluate(model, made).nll, evaluate(model, made, bf16=True).nll
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_not_a_number_is_reported() -> None:
    model = FAMILIES["llama_gqa"]()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    found = evaluate(model, rows(13))
    assert math.isnan(found.nll)
    assert math.isnan(found.perplexity)
    assert Loss(1e4, 3).perplexity == math.inf


def test_each_source_is_measured_on_its_validation_rows_with_progress() -> None:
    model, seen = FAMILIES["llama_gqa"](), []
    sources: dict[str, Any] = {"a": Source("a", rows(3), rows(13, 9)), "b": rows(7)}
    found = evaluate_sources(model, sources, batch=1, progress=lambda *told: seen.append(told))
    assert found == {"a": evaluate(model, rows(13, 9), batch=1), "b": evaluate(model, rows(7), batch=1)}
    assert seen == [("measuring a", 1, 2), ("measuring a", 2, 2), ("measuring b", 1, 1)]


def test_rows_without_a_token_to_predict_are_refused() -> None:
    with pytest.raises(PlanError, match="no token to predict"):
        evaluate(FAMILIES["llama_gqa"](), rows(5, prompt=5))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama_gqa", torch.float32), ("llama_gqa", torch.bfloat16), ("gpt2", torch.bfloat16), ("mixtral", torch.float32)],
)
def test_a_causal_model_reads_rows_that_fit_it(family: str, dtype: torch.dtype) -> None:
    require_readable(FAMILIES[family]().to(dtype), {"a": rows(13, 9)})


def small_gpt2(**change: int) -> nn.Module:
    sizes = {"vocab_size": 61, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 13} | change
    return GPT2LMHeadModel(GPT2Config(**sizes))


def small_bert() -> nn.Module:
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    return BertForMaskedLM(BertConfig(vocab_size=61, **sizes))


def small_t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=12, d_kv=4, d_ff=20, num_layers=1, num_heads=3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: small_gpt2(n_positions=12), "the model cannot read rows of 13 tokens: give a shorter length"),
        (lambda: small_gpt2(vocab_size=40), r"gives the token \d+, and the model knows 40: it is of another model"),
        (small_bert, "the model sees the tokens that it is to predict"),
        (small_t5, "has an encoder and a decoder"),
    ],
)
def test_a_model_that_cannot_read_the_rows_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        require_readable(make(), {"a": rows(13, 9)})


def test_a_loss_that_is_no_number_is_told_with_what_may_help() -> None:
    bad = {"texts": Loss(1.0, 5), "code": Loss(math.nan, 5)}
    with pytest.raises(PlanError, match=r"the loss of the pruned model on code is not a number: training diverged"):
        require_numbers(bad, "pruned")
    with pytest.raises(PlanError, match=r"the dense model on code is not a number$"):
        require_numbers(bad, "dense")
    require_numbers({"texts": Loss(math.inf, 5)}, "pruned")
