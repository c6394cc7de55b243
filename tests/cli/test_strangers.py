"""What a stranger's file ends in: exit code 2 and one sentence, no code run, nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Shear
from tests.cli.strangers import ADAPTER, CASES, DATA, EVAL, GROUPS, INPUTS, KNOWLEDGE, PLAN, RECIPE, SMALL, Case, build
from tests.cli.test_strangers_code import hostile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every case begins with; none of it changes."""
    return build(tmp_path_factory.mktemp("strangers") / "whole")


@pytest.fixture
def here(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy, as the current folder, with a module in it that tells when it is imported."""
    here = tmp_path / "here"
    shutil.copytree(whole, here)
    with hostile(here, monkeypatch):
        yield here


# Every third by default, of all kinds of files; all of them with `-m thorough`.
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.thorough] if place % 3 else [])
    for place, case in enumerate(CASES)
])  # fmt: skip
def test_a_file_of_a_stranger_is_told_in_a_sentence(here: Path, shear: Shear, case: Case) -> None:
    case.edit(here)
    before = listed(here.parent)
    said = shear(*case.command).sentence
    assert len(said) < 300
    assert said.isprintable()
    assert case.said in said
    assert listed(here.parent) == before


def listed(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir())


def test_what_the_cases_begin_with_is_in_order(here: Path, shear: Shear) -> None:
    for command in (GROUPS, SMALL, ADAPTER, EVAL, DATA, INPUTS, (*PLAN, "--dry-run"), (*KNOWLEDGE, "--dry-run")):
        assert shear(*command).code == 0, command


@pytest.mark.parametrize("recipe", ["pruning: {device: cuda}", "stages: {tuning: {device: cuda}}"])
def test_a_gpu_that_is_not_there_is_told_before_the_model_is_read(
    here: Path, shear: Shear, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shear_tools.cli.models.open_model", None)
    (here / "recipe.yaml").write_text(recipe)
    assert shear(*RECIPE).sentence == "device: cuda: torch sees no GPU here"


def test_a_folder_that_is_not_there_is_told_without_torch(here: Path) -> None:
    code = "import sys\nfrom shear_tools.cli import main\ntry: main(['groups', './no'])\nfinally: print('torch' in sys.modules)"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools")),
    }
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "False\n", "error: there is no folder ./no\n")
