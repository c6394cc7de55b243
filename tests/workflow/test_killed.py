"""``kill -9`` in the middle of LHSPG and of recovery: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shear_ir.workflow.run import Outcome
from tests.workflow.tiny import RATIO, write_model, write_recipe

ROOT = Path(__file__).resolve().parents[2]


def started(place: Path, data: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "shear_ir", "lorashear", str(place / "model"), "--ratio", str(RATIO), "--data", str(data),
        "--recipe", str(place / "recipe.yaml"), "-o", str(place / "out"),
    ]  # fmt: skip
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def killed_at(place: Path, data: Path, pattern: str, number: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """Start the command, and stop it as soon as ``pattern`` is there below its work; its code, and what it said."""
    with started(place, data) as process:
        until = time.monotonic() + 240
        while process.poll() is None and not list((place / "out.work").glob(pattern)) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert not (place / "out").exists()
    return process.returncode, said


@pytest.mark.slow
def test_a_run_that_is_killed_twice_and_interrupted_once_ends_as_one_that_was_not(
    tmp_path: Path, data: Path, whole: Outcome
) -> None:
    write_model(tmp_path / "model")
    write_recipe(tmp_path / "recipe.yaml")
    assert killed_at(tmp_path, data, "lhspg/checkpoint-*/complete")[0] == -signal.SIGKILL
    assert not (tmp_path / "out.work" / "pruned").exists()
    code, said = killed_at(tmp_path, data, "losses-pruned.json", signal.SIGINT)
    assert (code, said) == (130, "interrupted\n")
    assert killed_at(tmp_path, data, "recovery-0-reading/round-*/checkpoint-*/complete")[0] == -signal.SIGKILL
    assert (tmp_path / "out.work" / "losses-pruned.json").is_file()
    with started(tmp_path, data) as process:
        _, failed = process.communicate(timeout=240)
    assert process.returncode == 0, failed
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", Path(whole.saved.path))]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "recipe.yaml"]
