"""``sir.scores`` and ``sir.plan`` with data: what is asked for, what is done when nothing is."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_passes.importance import DEFAULT_WITH_DATA, Taylor
from shear_tools.api import pipeline
from tests.calibrated import batches, traced
from tests.zoo import build


def test_several_criteria_are_scored_in_one_pass() -> None:
    _, program, groups = traced("llama_gqa")
    found = sir.scores(program, "wanda", Taylor(order=2), data=iter(batches()))
    assert list(found) == ["wanda", "taylor{order=2}"]
    assert found["wanda"][groups.by_name["ffn0"]].shape == (44,)


def test_a_plan_removes_what_scores_lowest() -> None:
    model, program, groups = traced("llama_gqa")
    plan = sir.plan(program, ratio=0.3, importance="wanda", data=batches())
    found = sir.scores(program, "wanda", data=batches())["wanda"]
    for cut in plan.cuts:
        values = found[groups.by_name[cut.group]]
        gone = np.setdiff1d(np.arange(cut.size), cut.kept)
        assert values[gone].max() < values[cut.kept].min()
    small = sir.shear(model, plan)
    sir.verify(model, small, plan).raise_if_unsound()


def test_the_default_looks_at_data_where_there_is_some() -> None:
    _, program, _ = traced("llama_gqa")
    assert sir.plan(program, ratio=0.2, data=batches()).options["importance"] == DEFAULT_WITH_DATA


def test_without_data_the_default_says_what_it_costs() -> None:
    _, program, _ = traced("llama_gqa")
    with pytest.warns(UserWarning, match="magnitude looks at no data: a language model .* is ruined") as told:
        assert sir.plan(program, ratio=0.2).options["importance"] == "magnitude"
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sir.plan(program, ratio=0.2, importance="magnitude")
        sir.plan(traced("vit")[1], ratio=0.2)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit", "mixtral", "mixtral_batched", "resnet"])
def test_every_family_is_judged_by_data(family: str) -> None:
    _, program, groups = traced(family)
    data: Any = batches()
    if family in ("vit", "resnet"):
        data = [torch.randn(2, 3, 30, 30)]
    elif family == "t5":
        data = [{**b, "decoder_input_ids": b["input_ids"][:, :7]} for b in data]
    kinds = ["conv_channel"] if family == "resnet" else ["ffn", "kv_head"]
    found = sir.scores(program, "wanda", "flap", "minitron", data=data)
    for group in (g for g in groups if g.prunable and g.kind in kinds):
        for name, values in found.items():
            assert (values[group] > 0).all(), (name, group.name)


def test_weights_that_have_changed_are_scored_anew() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    program = sir.trace(model, torch.randn(3, 6))
    data = [torch.randn(7, 6)]
    group = next(g for g in sir.groups(program) if g.size == 10)
    before = sir.scores(program, "wanda", data=data)["wanda"][group]
    with torch.no_grad():
        model[2].weight.mul_(2.0)  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(sir.scores(program, "wanda", data=data)["wanda"][group], 2 * before, rtol=1e-5)


def test_a_function_of_outputs_and_batch_is_the_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    program = sir.trace(model, torch.randn(3, 6))

    def loss(outputs: Tensor, feed: Any) -> Tensor:
        return outputs.square().mean()

    found = sir.scores(program, "taylor", data=[torch.randn(7, 6)], loss=loss)["taylor"]
    assert all((values > 0).all() for values in found.values())
    with pytest.raises(PlanError, match="this criterion needs a loss, and Sequential gives none"):
        sir.scores(program, "taylor", data=[torch.randn(7, 6)])


def test_data_that_the_model_cannot_read_or_predict_is_refused() -> None:
    _, program, _ = traced("llama_gqa")
    with pytest.raises(PlanError, match="LlamaForCausalLM does not run on the calibration data: index out of range"):
        sir.scores(program, "wanda", data=[torch.full((2, 4), 999)])
    with pytest.raises(PlanError, match="the loss of a batch of the calibration data is not a number: no token of it"):
        sir.scores(program, "taylor", data=[torch.ones(2, 1, dtype=torch.long)])


@pytest.mark.anew
def test_a_program_holds_its_model_until_it_is_let_go() -> None:
    program = sir.trace(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)), torch.randn(3, 6))
    gc.collect()
    data = [torch.randn(7, 6)]
    assert sir.plan(program, ratio=0.3, importance="wanda", data=data).ratio > 0.2
    reference = weakref.ref(pipeline.model_of(program))
    pipeline.forget(program)
    gc.collect()
    assert reference() is None
    with pytest.raises(PlanError, match="the model of this program is gone"):
        sir.scores(program, "wanda", data=data)
    with pytest.raises(PlanError, match="the model of this program is gone"):
        sir.plan(program, ratio=0.3)


NAMES = (
    "wanda",
    "flap",
    "minitron",
    "taylor",
    "taylor-mixed",
    "lora-guided",
    "mini-llm{directions=2}",
    "bonsai{masks=3}",
)


def test_a_placed_model_is_scored_as_it_is_and_an_offloaded_one_where_weights_are_not_read() -> None:
    model: Any = build("llama_gqa")
    program = sir.trace(model)
    ffn = sir.groups(program).by_name["ffn0"]
    plain = sir.scores(program, *NAMES, data=batches())
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    placed = sir.scores(program, *NAMES, data=batches())
    for name in NAMES:
        np.testing.assert_allclose(placed[name][ffn], plain[name][ffn], rtol=1e-5)
    accelerate.hooks.remove_hook_from_submodules(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    minitron = sir.scores(program, "minitron", data=batches())["minitron"]
    np.testing.assert_allclose(minitron[ffn], plain["minitron"][ffn], rtol=1e-5)
    for name in NAMES:
        if name != "minitron":
            with pytest.raises(PlanError, match=r"has only its shapes|is not here as numbers|is offloaded"):
                sir.scores(program, name, data=batches())
