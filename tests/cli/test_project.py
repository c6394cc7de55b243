"""Adapters on the command line: projected, kept or merged by prune, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from transformers import LlamaForCausalLM

import shear_ir as sir
from tests.cli.conftest import Shear
from tests.peft_models import adapted


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    """An adapter of the tiny Llama, beside it."""
    folder = llama.parent / "adapter"
    adapted(LlamaForCausalLM.from_pretrained(llama), "q_proj", "v_proj").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_an_adapter_is_projected_by_the_folder_that_prune_wrote(
    shear: Shear, adapter: Path, pruned: Path, tmp_path: Path
) -> None:
    ran = shear("project", adapter, "--plan", pruned, "-o", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    digest = sir.base_digest(sir.load(pruned))
    assert ran.out.splitlines()[1:] == [f"base   digest {digest}", f"wrote  {tmp_path / 'out'}"]
    assert isinstance(sir.load(tmp_path / "out"), peft.PeftModel)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert shear("groups", tmp_path / "out").code == 0
    again = ("project", adapter, "--plan", pruned / "plan.json", "-o", tmp_path / "out", "--json")
    assert "exists already" in shear(*again).sentence
    assert shear(*again, "--force").json["base_digest"] == digest


def test_the_help_of_project_has_an_example(shear: Shear) -> None:
    assert "shear-ir project ./my-adapter --plan ./my-llama-small" in shear("project", "--help").out


def test_the_base_may_be_a_config_alone(
    shear: Shear, adapter: Path, pruned: Path, config_only: Path, tmp_path: Path
) -> None:
    assert shear("project", adapter, "--plan", pruned, "--base", config_only, "-o", tmp_path / "out").code == 0


def test_what_does_not_belong_together_is_refused(shear: Shear, adapter: Path, pruned: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    small = ("project", adapter, "--plan", pruned, *out, "--base", pruned)
    assert "the plan was made for another model" in shear(*small).sentence
    assert f"{adapter} holds no plan.json" in shear("project", adapter, "--plan", adapter, *out).sentence
    assert f"{pruned} holds no adapter_config.json" in shear("project", pruned, "--plan", pruned, *out).sentence
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_adapters_and_verify_agrees(shear: Shear, adapter: Path, tmp_path: Path) -> None:
    ran = shear("prune", adapter, "--ratio", "0.2", "-o", tmp_path / "out")
    assert ran.code == 0
    assert "stock  yes: LlamaForCausalLM.from_pretrained loads it" in ran.out
    assert sorted(p.name for p in (tmp_path / "out/adapters/default").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "shear_ir_adapter.json"
    ]  # fmt: skip
    assert shear("verify", adapter, tmp_path / "out").code == 0
    # The whole folder is a model of shear-ir's own, and one of its adapters is too.
    assert shear("prune", tmp_path / "out/adapters/default", "--ratio", "0.1", "-o", tmp_path / "twice").code == 0


def test_prune_merges_by_a_plan_of_the_base(
    shear: Shear, adapter: Path, llama: Path, pruned: Path, tmp_path: Path
) -> None:
    ran = shear("prune", adapter, "--plan", pruned / "plan.json", "--merge", "-o", tmp_path / "out", "--json")
    assert ran.json["verified"]["sound"] is True
    assert ran.json["stock"] is True
    assert not (tmp_path / "out/adapters").exists()
    assert shear("verify", adapter, tmp_path / "out").code == 0
    refused = shear("prune", llama, "--ratio", "0.2", "--merge", "-o", tmp_path / "no").sentence
    assert refused == f"{llama} has no adapters to merge"
    graph = shear("prune", adapter, "--ratio", "0.2", "--backend", "graph", "-o", tmp_path / "no").sentence
    assert graph == "a graph with adapters is not saved: cut the modules, or merge the adapters first"


def test_an_adapter_of_another_base_is_refused(shear: Shear, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    note = {"format": "shear-ir adapter 1", "base_digest": "0" * 16, "base": ""}
    (folder / "shear_ir_adapter.json").write_text(json.dumps(note))
    refused = shear("prune", folder, "--ratio", "0.2", "-o", tmp_path / "out").sentence
    assert "was made for another base: the shapes of that one have the digest 0000000000000000" in refused
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused_in_a_sentence(shear: Shear, llama: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in llama.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    packed = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    said = "is quantised (bitsandbytes, 4 bits), and packed weights cannot be cut: give the unquantised model"
    assert shear("prune", base, "--ratio", "0.2", "-o", tmp_path / "out").sentence == f"{base} {said}"
    own = tmp_path / "adapter"
    own.mkdir()
    for file in adapter.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    settings = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    assert shear("prune", own, "--ratio", "0.2", "-o", tmp_path / "out").sentence.endswith(f"{base} {said}")
    assert not (tmp_path / "out").exists()
