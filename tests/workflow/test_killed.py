"""``kill -9`` in the middle of LHSPG and of recovery: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shear_tools.cli import main
from shear_tools.workflow.run import Outcome
from tests.workflow.tiny import RATIO, write_model, write_recipe

ROOT = Path(__file__).resolve().parents[2]


def command(place: Path, data: Path) -> list[str]:
    return [
        "lorashear", str(place / "model"), "--ratio", str(RATIO), "--data", str(data),
        "--recipe", str(place / "recipe.yaml"), "-o", str(place / "out"),
    ]  # fmt: skip


def killed_at(arguments: list[str], what: str, step: int) -> None:
    """Run the command in a process that kills itself when it says that it is at ``step`` of ``what``."""
    code = (
        "import os, signal, torch; from shear_tools.cli import console, main; torch.set_num_threads(1)\n"
        "def told(self, said, done, total):\n"
        f"    if (said, done) == {(what, step)!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"console.Told.__call__ = told; main({arguments!r})"
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=600)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(tmp_path: Path, data: Path, whole: Outcome) -> None:
    write_model(tmp_path / "model")
    write_recipe(tmp_path / "recipe.yaml")
    arguments, work = command(tmp_path, data), tmp_path / "out.work"
    killed_at(arguments, "pruning", 3)
    assert list(work.glob("lhspg/checkpoint-*/complete"))
    assert not (work / "pruned").exists()
    killed_at(arguments, "reading: round 2", 2)
    assert (work / "losses-pruned.json").is_file()
    assert list(work.glob("recovery-0-reading/round-2/checkpoint-*/complete"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", Path(whole.saved.path))]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "recipe.yaml"]
