"""Output folders and what a killed writer leaves beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from shear_backends.folder import tidy, written_whole

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, signal, sys
from pathlib import Path
from shear_backends import folder
real, left = os.rename, int(sys.argv[2])
def rename(*paths):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(*paths)
os.rename = rename
with folder.written_whole(Path(sys.argv[1]), force=True) as beside:
    (beside / "new").touch()
"""
"""Writes the folder of the first argument and is killed at one of its renames."""


def killed(out: Path, after: int) -> list[str]:
    """What lies beside ``out`` when a writer of it is killed after so many renames."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends"))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), str(after)], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    return names(out.parent)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (left,) = killed(tmp_path / "out", after=0)
    assert left.startswith(".out.shear-ir-new-")
    with written_whole(tmp_path / "out") as beside:
        (beside / "file").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_a_result_that_a_killed_writer_was_replacing_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_whole(out) as beside:
        (beside / "shear_ir.json").touch()
    assert "out" not in killed(out, after=1)
    tidy(out)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["shear_ir.json"]


def test_a_folder_that_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_whole(out) as beside:
        (beside / "file").touch()
        tidy(out)
    assert names(out) == ["file"]


def test_what_is_not_known_to_be_a_writers_is_never_removed(tmp_path: Path) -> None:
    mine = [
        ".out.notes_12",
        ".out.shear-ir-new-2",
        ".out2.shear-ir-new-abcdefgh",
        "..out.shear-ir-new-abcdefgh",
        "out.work",
    ]
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.shear-ir-new-12345678").symlink_to(tmp_path / "out.work")
    tidy(tmp_path / "out")
    assert names(tmp_path) == sorted([*mine, ".out.shear-ir-new-12345678"])
