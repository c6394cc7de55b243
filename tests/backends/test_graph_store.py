"""A graph in a folder: what is read is what was written, bit for bit, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shear_ir as sir
from shear_backends.graph.module import ShearedGraph
from tests.peft_models import adapted
from tests.roads import Traced, traced
from tests.zoo import FAMILIES

KINDS = ("ffn", "kv_head", "conv_channel")


def cut(name: str) -> tuple[Traced, sir.Plan, nn.Module]:
    family = traced(name)
    kinds = [kind for kind in KINDS if family.able(kind)]
    plan = sir.plan(family.program, ratio=0.2, importance="random", stock=False, kinds=kinds)
    return family, plan, sir.shear(family.model, plan, backend="graph")


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "t5", "resnet"])
def test_a_graph_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    family, plan, small = cut(name)
    saved = sir.save(small, tmp_path / "out")
    assert (saved.stock, saved.note) == (False, "a graph, and no module of its class")
    with_class = None if hasattr(family.model, "config") else FAMILIES[name]()
    again = sir.load(tmp_path / "out", with_class)
    assert isinstance(again, ShearedGraph)
    with torch.no_grad():
        for a, b in zip(small(**family.feed), again(**family.feed), strict=True):
            assert torch.equal(a, b)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert sir.verify(family.model, again, plan).sound
    once_more = sir.save(again, tmp_path / "twice")
    assert (once_more.path / "graph" / "tensors.safetensors").read_bytes() == (
        tmp_path / "out" / "graph" / "tensors.safetensors"
    ).read_bytes()


def test_it_trains_after_it_was_read(tmp_path: Path) -> None:
    family, _, small = cut("llama_gqa")
    sir.save(small, tmp_path / "out")
    again = sir.load(tmp_path / "out")
    again(**family.feed)[0].square().mean().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_the_folder_is_no_stock_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sir.save(cut("llama_gqa")[2], tmp_path / "out")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_is_damaged_or_of_another_model_is_refused(tmp_path: Path) -> None:
    sir.save(cut("llama_gqa")[2], tmp_path / "out")
    file = tmp_path / "out" / "graph" / "tensors.safetensors"
    with pytest.raises(sir.PlanError, match="was made of a LlamaForCausalLM, not of a GPT2LMHeadModel"):
        sir.load(tmp_path / "out", FAMILIES["gpt2"]())
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(sir.LoadError, match=r"does not hold the tensors that plan\.json leaves"):
        sir.load(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(sir.LoadError, match="is not a whole safetensors file"):
        sir.load(tmp_path / "out")


def test_a_graph_with_adapters_or_of_nobody_is_not_saved(tmp_path: Path) -> None:
    model = adapted("llama_gqa", "q_proj")
    plan = sir.plan(sir.trace(model), ratio=0.2, importance="random")
    with pytest.raises(sir.SaveError, match="a graph with adapters is not saved"):
        sir.save(sir.shear(model, plan, backend="graph"), tmp_path / "out")
    small = cut("llama_gqa")[2]
    small.record = None
    with pytest.raises(sir.SaveError, match=r"not made by shear_ir\.shear"):
        sir.save(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_record_says_which_backend_made_it(tmp_path: Path) -> None:
    sir.save(cut("mlp")[2], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "shear_ir.json").read_text())["backend"] == "graph"
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(sir.LoadError, match="which no config builds: give the dense model"):
        sir.load(tmp_path / "out")
