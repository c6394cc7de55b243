"""Every kind of MODEL, and what is said about one that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Shear


def test_a_folder_a_config_and_a_name_on_the_hub_are_one_model(
    shear: Shear, llama: Path, config_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shear_ir.frontend.load._download", lambda spec, trust, weights: llama)
    listed = [shear("groups", spec, "--json").json["groups"] for spec in (llama, config_only, "someone/llama")]
    assert listed[0] == listed[1] == listed[2]
    assert {g["kind"] for g in listed[0]} >= {"ffn", "kv_head", "head_dim"}


def test_a_factory_gives_its_model_and_prints_nothing_on_stdout(shear: Shear) -> None:
    ran = shear("groups", "tests.cli.factories:talkative", "--json")
    assert [g["kind"] for g in ran.json["groups"]] == ["ffn"]
    assert ran.err == "building\n"


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to break."""
    return shutil.copytree(llama, tmp_path / "broken")


def test_a_truncated_file_is_named(shear: Shear, broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = shear("prune", broken, "--ratio", "0.2", "-o", tmp_path / "out")
    assert ran.sentence.startswith(f"{weights} is not a whole safetensors file: ")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_shard_outside_of_the_folder_is_not_read(shear: Shear, broken: Path, tmp_path: Path) -> None:
    shutil.move(broken / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert shear("groups", broken).sentence.endswith("../secret.safetensors, which lies outside of the folder")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, " holds no tokenizer: save the one that the model was trained with there (save_pretrained)"),
        ('{"version": ', "/tokenizer.json cannot be read: Expecting value: line 1 column 13 (char 12)"),
    ],
)
def test_a_model_without_a_tokenizer_is_one_whole_sentence(
    shear: Shear, broken: Path, tmp_path: Path, text: str | None, said: str
) -> None:
    (broken / "tokenizer.json").unlink()
    if text is not None:
        (broken / "tokenizer.json").write_text(text)
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    assert shear("eval", broken, "--data", tmp_path / "rows.jsonl").sentence.endswith(f"{broken}{said}")


def test_a_config_of_an_unknown_type_is_one_sentence(shear: Shear, broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "nonsense"}')
    assert "nonsense" in shear("groups", broken).sentence


def test_a_damaged_record_is_named(shear: Shear, llama: Path, pruned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned, tmp_path / "copy")
    (copy / "shear_ir.json").write_text('{"stock": false}')
    assert shear("groups", copy).sentence.startswith(f"{copy / 'shear_ir.json'} is damaged: ")
    assert shear("verify", llama, copy).sentence.startswith(f"{copy / 'shear_ir.json'} is damaged: ")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("./no/such/folder", "there is no folder ./no/such/folder"),
        ("no-such/model", "no model of that name could be had from the Hugging Face Hub"),
        (".", ". holds neither config.json nor adapter_config.json"),
        ("no_such_module:model", "there is no module no_such_module"),
        ("tests.cli.factories:absent", "tests.cli.factories has no absent"),
        ("tests.cli.factories:nothing", "tests.cli.factories:nothing returns int, not a torch.nn.Module"),
    ],
)
@pytest.mark.parametrize("command", ["groups", "prune"])
def test_a_model_that_is_not_there_is_one_sentence(
    shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, spec: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("--ratio", "0.2", "-o", "out") if command == "prune" else ()
    assert said in shear(command, spec, *more).sentence
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_shear_ir_did_not_write_cannot_be_verified(shear: Shear, llama: Path) -> None:
    assert shear("verify", llama, llama / "none").sentence == f"there is no folder {llama / 'none'}"
    assert shear("verify", llama, llama).sentence == f"{llama} was not written by shear-ir: it holds no shear_ir.json"


def test_a_config_alone_cannot_be_verified(shear: Shear, config_only: Path, pruned: Path) -> None:
    refused = shear("verify", config_only, pruned).sentence
    assert refused.endswith("has no weights, only a config: there is nothing to compare with")
