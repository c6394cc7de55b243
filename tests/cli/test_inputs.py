"""``--inputs FILE``: forward's arguments from a file, for models whose signature does not say what they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from tests.cli.conftest import Shear

PAIR = "tests.cli.factories:pair"


@pytest.fixture
def given(tmp_path: Path) -> Path:
    file = tmp_path / "inputs.safetensors"
    save_file({"right": torch.randn(5, 3), "left": torch.randn(5, 4)}, file)
    return file


def test_without_them_it_says_what_to_give(shear: Shear) -> None:
    assert "cannot be guessed from its signature" in shear("groups", PAIR).sentence


def test_every_command_that_traces_takes_them(shear: Shear, given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shear("prune", PAIR, "--ratio", "0.3", "-o", out, "--inputs", given).code == 0
    report = shear("verify", PAIR, out, "--inputs", given, "--json").json
    assert report["sound"]
    assert report["lengths"][0] == [5, 4]
    for command in (("groups", PAIR), ("dump", PAIR), ("explain", PAIR, "ffn"), ("opt", PAIR, "-p", "dead-code")):
        assert shear(*command, "--inputs", given).code == 0, command
    assert shear("visualize", PAIR, "-o", tmp_path / "groups.svg", "--inputs", given).code == 0


def test_files_that_hold_none_are_refused(shear: Shear, given: Path, tmp_path: Path) -> None:
    assert "has no argument middle; it has left, right" in _refused(shear, tmp_path, {"middle": torch.ones(1)})
    said = "is no safetensors file with forward's arguments by name"
    assert said in shear("groups", PAIR, "--inputs", tmp_path / "none.safetensors").sentence
    (tmp_path / "text.safetensors").write_text("left")
    assert said in shear("groups", PAIR, "--inputs", tmp_path / "text.safetensors").sentence


def _refused(shear: Shear, folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / "wrong.safetensors")
    return shear("groups", PAIR, "--inputs", folder / "wrong.safetensors").sentence
