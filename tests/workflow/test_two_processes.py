"""The whole command under ``accelerate launch`` with two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shear_ir.plans import Plan
from shear_tools.cli import main
from shear_tools.workflow.recipe import Recipe
from tests.training.test_two_processes import free_port
from tests.workflow.tiny import RATIO, RECIPE, write_model, write_recipe

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--module",
)  # fmt: skip


def anywhere(recipe: Recipe) -> Recipe:
    """Without a device: both processes find that there is none but the CPU."""
    return replace(recipe, pruning=replace(recipe.pruning, device=None), recovery=replace(recipe.recovery, device=None))


def arguments(place: Path, data: Path, out: str) -> list[str]:
    return [
        "lorashear", str(place / "model"), "--ratio", str(RATIO), "--data", str(data),
        "--recipe", str(place / "recipe.yaml"), "-o", str(place / out), "--json",
    ]  # fmt: skip


def by_one(given: list[str]) -> None:
    """Run the command in this process."""
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 0


def by_two(given: list[str]) -> str:
    """Run the command in two processes; their standard output."""
    command = [sys.executable, *LAUNCH[:-1], f"--main_process_port={free_port()}", LAUNCH[-1], "shear_ir", *given]
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cuts(folder: Path) -> Any:
    return json.loads((folder / "plan.json").read_text())["cuts"]


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_end_with_the_zero_set_of_one(tmp_path: Path, data: Path) -> None:
    write_model(tmp_path / "model")
    write_recipe(tmp_path / "recipe.yaml", anywhere(RECIPE))
    one, two = tmp_path / "one", tmp_path / "two"
    by_one(arguments(tmp_path, data, "one"))
    said = by_two(arguments(tmp_path, data, "two"))
    assert cuts(two) == cuts(one)
    assert sum(cut.size - len(cut.kept) for cut in Plan.load(two / "plan.json").cuts) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "recipe.yaml", "two"]
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    # The first process alone has the last word, and what it says is what one process says but for rounding.
    told, alone = json.loads(said), json.loads((one / "report.json").read_text())
    assert told["losses"]["dense"] == alone["losses"]["dense"]
    for name in ("pruned", "reading", "tuning"):
        for source, loss in alone["losses"][name].items():
            assert told["losses"][name][source]["nll"] == pytest.approx(loss["nll"], rel=0.02)
