"""The whole road on every family: heads and channels go together, by both backends, and the function is the masked one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_backends.verify.numbers import Report, run
from shear_ir.plans import Plan
from tests.roads import HEADS, Traced, counted, greedy, outputs, same, traced
from tests.zoo import FAMILIES, TWINS

RATIO = {"depthwise_separable": 0.14}  # its widest channels are held by the residual stream

# Families that no config of their class can say after the cut; all others reload by the stock class, bit for bit.
NOT_STOCK = {
    # No transformers models
    "mlp": "a plain module",
    "concat_and_split": "a plain module",
    "resnet": "a plain module",
    "depthwise_separable": "a plain module",
    # head_dim is hidden / heads and cannot be set: fewer heads would be wider ones
    "stablelm": "head_dim = hidden_size // num_attention_heads",
    "gpt2": "head_dim = n_embd // n_head",
    "gpt_neox": "head_size = hidden_size // num_attention_heads",
    "gptj": "head_dim = n_embd // n_head",
    "gpt_bigcode": "head_dim = n_embd // n_head",
    "codegen": "head_dim = n_embd // n_head",
    "falcon_new": "head_dim = hidden_size // num_attention_heads",
    "falcon_old": "head_dim = hidden_size // num_attention_heads",
    "falcon_alibi": "head_dim = hidden_size // num_attention_heads",
    "falcon_mqa": "head_dim = hidden_size // num_attention_heads",
    "bloom": "head_dim = hidden_size // n_head; ALiBi's slopes are made from the number of heads",
    "opt": "head_dim = hidden_size // num_attention_heads",
    "mpt": "head_dim = d_model // n_heads; ALiBi's slopes are made from the number of heads",
    "bert": "attention_head_size = hidden_size // num_attention_heads",
    "roberta": "attention_head_size = hidden_size // num_attention_heads",
    "electra": "attention_head_size = hidden_size // num_attention_heads",
    "modernbert": "head_dim = hidden_size // num_attention_heads",
    "deberta_v2": "attention_head_size = hidden_size // num_attention_heads",
    "bart": "head_dim = d_model // heads",
    "dinov2": "the MLP's width is hidden_size * mlp_ratio",
    # q_norm and k_norm run over all heads, so fewer heads need another eps than the other norms have
    "olmoe": "one rms_norm_eps for all norms",
    "resnet_hub": "the inner width of a block is a quarter of its outer one",
}


@dataclass(frozen=True, eq=False)
class Road:
    """One family, planned once and sheared by both backends."""

    name: str
    traced: Traced
    plan: Plan

    @property
    def model(self) -> nn.Module:
        return self.traced.model

    @functools.cached_property
    def module(self) -> nn.Module:
        return sir.shear(self.model, self.plan)

    @functools.cached_property
    def graph(self) -> nn.Module:
        return self.traced.sheared_graph(self.plan)

    def verified(self, small: nn.Module) -> Report:
        return sir.verify(self.model, small, self.plan)


def kinds_of(family: Traced) -> list[str]:
    """Heads and channels: whole kv heads with their query heads where there are several."""
    heads = [k for k in HEADS if any(g.kind == k and (g.prunable or g.rescalable) for g in family.groups)]
    return heads[:1] + [k for k in ("ffn", "conv_channel") if family.able(k)]


ROADS = [pytest.param(name, marks=[pytest.mark.thorough] if name in TWINS else []) for name in FAMILIES]


@pytest.fixture(scope="module", params=ROADS)
def road(request: pytest.FixtureRequest) -> Road:
    family = traced(request.param)
    ratio = RATIO.get(request.param, 0.25)
    # Experts are run by products of groups, which want rows of a multiple of 16 bytes.
    plan = sir.plan(family.program, ratio=ratio, kinds=kinds_of(family), importance="random", round_to=4)
    return Road(request.param, family, plan)


@pytest.mark.unlike
def test_the_graph_backend_computes_the_masked_original(road: Road) -> None:
    report = road.verified(road.graph)
    assert len(set(report.lengths)) >= 2
    assert report.max_abs_diff <= 1e-5
    assert report.moved > 0.05


def test_the_module_backend_computes_the_masked_original(road: Road) -> None:
    assert type(road.module) is type(road.model)
    report = road.verified(road.module)
    assert report.max_abs_diff <= 1e-5
    assert report.moved > 0.05


@pytest.mark.unlike
def test_all_kinds_lose_units_and_the_parameters_are_really_gone(road: Road) -> None:
    # In the smallest models one head alone is more than was asked for, and no channel has to go.
    lost = {c.kind for c in road.plan.cuts}
    assert lost
    assert lost <= set(kinds_of(road.traced))
    assert 0.1 < road.plan.ratio < 0.35
    # A parameter that forward never reads is in no graph.
    unread = sum(p.numel for n, p in road.traced.program.params.items() if not _read(road, n) and p.kind == "parameter")
    assert counted(road.graph) == road.plan.after.parameters - unread
    assert counted(road.module) == road.plan.after.parameters


def _read(road: Road, name: str) -> bool:
    return bool(road.traced.program.placeholder_of[name].users)


def test_a_saved_model_loads_identically(road: Road, tmp_path: Path) -> None:
    expected = outputs(road.module, road.traced.feed)
    saved = sir.save(road.module, tmp_path / "out")
    assert saved.stock == (road.name not in NOT_STOCK), saved.note
    dense = None if hasattr(road.model, "config") else road.model
    assert same(outputs(_alike(sir.load(saved.path, dense), road.model), road.traced.feed), expected)
    if saved.stock:
        stock = type(road.model).from_pretrained(saved.path)  # type: ignore[attr-defined]
        assert same(outputs(_alike(stock, road.model), road.traced.feed), expected)


def _alike(model: nn.Module, dense: nn.Module) -> nn.Module:
    """``model`` with experts run as in ``dense``: a choice that no checkpoint keeps."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(dense.get_experts_implementation())  # type: ignore[operator]
    return model


@pytest.mark.unlike
def test_generation_with_a_cache_is_greedy_decoding_by_the_masked_original(road: Road) -> None:
    if not getattr(road.model, "can_generate", bool)():
        pytest.skip("makes no text")
    if road.model.config.is_encoder_decoder:  # type: ignore[union-attr]
        pytest.skip("generate begins the decoder's text in its own way")
    feed = {name: ids.clamp(min=3) for name, ids in road.traced.feed.items() if name != "attention_mask"}
    feed["attention_mask"] = torch.ones_like(feed["input_ids"])
    with torch.no_grad():
        made = road.module.generate(**feed, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=True)  # type: ignore[operator]
    assert torch.equal(made, greedy(road.model, road.plan, feed, tokens=5))


@pytest.mark.unlike
def test_the_graph_trains_as_the_original_would(road: Road) -> None:
    graph, feed = road.graph, road.traced.feed
    with torch.no_grad():
        targets = [torch.randn_like(t) for t in run(graph, feed)]

    def loss() -> torch.Tensor:
        return sum(((a - b) ** 2).mean() for a, b in zip(run(graph, feed), targets, strict=True))  # type: ignore[return-value]

    before = loss()
    before.backward()
    silent = {n for n, p in graph.named_parameters() if p.grad is None}
    assert silent == _silent(road.model, feed) & {n for n, _ in graph.named_parameters()}
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
        assert loss() < before


def _silent(model: nn.Module, feed: dict[str, torch.Tensor]) -> set[str]:
    """The parameters that no gradient reaches in the dense model."""
    model.zero_grad()
    sum(t.float().square().mean() for t in run(model, feed)).backward()  # type: ignore[union-attr]
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    return silent
