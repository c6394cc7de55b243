"""What lies outside of a model's folder stays there, and nothing that is written says where anything lay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from shear_backends.store.model import carry
from shear_ir.frontend.load import load_model
from shear_ir.writing import placeless
from tests.cli.conftest import Shear


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "secret"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt"):
        (folder / name).write_text("the secret")
    return folder


@pytest.mark.parametrize(
    ("at", "to"),
    [("1_Pooling", "../secret"), ("vocab.txt", "../secret/vocab.txt"), ("added_tokens.json", "SECRET/tokenizer.json")],
)
def test_a_link_out_of_the_folder_is_not_followed(
    shear: Shear, llama: Path, secret: Path, tmp_path: Path, at: str, to: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    (model / at).symlink_to(to.replace("SECRET", str(secret)))
    carry(model, secret.parent)  # beside it
    assert not (tmp_path / at).exists()
    assert (tmp_path / "tokenizer.json").read_text() == (llama / "tokenizer.json").read_text()


def test_a_link_within_the_folder_is_followed_and_code_is_not(llama: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(llama, model)
    out.mkdir()
    (model / "vocab.txt").symlink_to("notes.md")
    for name in ("my_vocab.py", "vocab.bin", "vocab.pkl"):
        (model / name).write_text("x")
    carry(model, out)
    assert {p.name for p in out.iterdir()} == {
        "vocab.txt", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_a_snapshot_of_the_hub_is_carried_from_its_repository(llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    blobs, snapshot, out = repository / "blobs", repository / "snapshots" / "0", tmp_path / "out"
    for folder in (blobs, snapshot, out):
        folder.mkdir(parents=True)
    shutil.copy(llama / "tokenizer.json", blobs / "1")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (tmp_path / "other").write_text("the secret")
    (snapshot / "vocab.txt").symlink_to("../../../other")
    carry(snapshot, out)
    assert [p.name for p in out.iterdir()] == ["tokenizer.json"]


def test_another_folder_gives_the_same_bytes_and_no_path(
    shear: Shear, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("one", "another"):
        here = tmp_path / name
        here.mkdir()
        shutil.copytree(llama, here / "model")
        model = get_peft_model(load_model(str(here / "model")).model, LoraConfig(r=2, target_modules=["q_proj"]))
        for parameter in model.parameters():
            parameter.data.fill_(0.25)
        model.save_pretrained(str(here / "ad"))
        assert shear("prune", here / "ad", "--ratio", "0.2", "--no-verify", "-o", here / "out").code == 0
        files = {str(p.relative_to(here)): p.read_bytes() for p in (here / "out").rglob("*") if p.is_file()}
        assert not [name for name, content in files.items() if os.fsencode(tmp_path) in content]
        made.append(files)
    assert made[0] == made[1]


def test_words_of_a_command_are_told_without_their_folders() -> None:
    assert [*map(placeless, ("/a/b/model", "--out=/a/out", "b/c", "ffn=64", "0.2"))] == [
        "model", "--out=out", "b/c", "ffn=64", "0.2",
    ]  # fmt: skip
