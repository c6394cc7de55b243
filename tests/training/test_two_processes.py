"""LHSPG and measurements under ``accelerate launch`` with two processes on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(processes: int, out: Path, module: str = "two_processes") -> Any:
    # Without --cpu, which starts one process only: the script itself stays on the CPU.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *(["--multi_gpu"] if processes > 1 else ["--cpu"]), f"--num_processes={processes}", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1", f"--main_process_port={free_port()}",
        "--module", f"tests.training.{module}", str(out),
    ]  # fmt: skip
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools"))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_two_processes_end_with_the_zero_set_of_one(tmp_path: Path) -> None:
    one, two = launch(1, tmp_path / "one.json"), launch(2, tmp_path / "two.json")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["zero"]) == 41
    assert one["zero"] == two["zero"]


@pytest.mark.thorough
def test_two_processes_share_a_measurement_and_have_the_bits_of_one(tmp_path: Path) -> None:
    one = launch(1, tmp_path / "one.json", "two_measuring")
    two = launch(2, tmp_path / "two.json", "two_measuring")
    (alone,) = one["each"]
    # Two sources of six rows, two rows at a time: of three batches the first process has two.
    assert (alone["calls"], [each["calls"] for each in two["each"]]) == (6, [4, 2])
    assert [each["losses"] for each in two["each"]] == [alone["losses"]] * 2
    # One process may cut, check and repair for longer than the ten minutes after which torch gives up.
    assert two["patience"] > 24 * 3600
