"""Output folders and what a killed writer leaves beside them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shear_backends.store.folder import refuse_existing, tidy, written_whole
from shear_ir.errors import SaveError
from shear_ir.writing import locked, write_text

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, signal, sys
from pathlib import Path
from shear_backends.store import folder
real, left = os.rename, int(sys.argv[2])
def rename(*paths):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(*paths)
os.rename = rename
folder._exchanged = lambda one, other: False  # as where the system cannot
with folder.written_whole(Path(sys.argv[1]), force=True) as beside:
    (beside / "new").touch()
"""
"""Writes the folder of the first argument and is killed at one of its renames."""


def killed(out: Path, after: int) -> list[str]:
    """What lies beside ``out`` when a writer of it is killed after so many renames."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools"))
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


def test_a_result_is_exchanged_at_one_stroke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with written_whole(out) as beside:
        (beside / "shear_ir.json").touch()
    monkeypatch.delattr("os.rename")  # a name that is moved away leaves a moment without one
    with written_whole(out, force=True) as beside:
        (beside / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


def test_what_is_written_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with written_whole(tmp_path / "out") as beside:
            (beside / "weights").touch(mode=0o600)
            (beside / "inner").mkdir(mode=0o700)
        write_text(tmp_path / "file", "x")
        os.umask(0o077)
        write_text(tmp_path / "mine", "x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"out": 0o755, "weights": 0o644, "inner": 0o755, "file": 0o644, "mine": 0o600}


def test_the_next_writer_of_a_file_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.shear-ir-12345678").write_text("half of")
    (tmp_path / ".plan.json.shear-ir-mine").write_text("of something else")
    held = tmp_path / ".plan.json.shear-ir-87654321"
    held.write_text("being written")
    with locked(held) as mine:
        assert mine
        write_text(tmp_path / "plan.json", "{}")
    assert names(tmp_path) == [".plan.json.shear-ir-87654321", ".plan.json.shear-ir-mine", "plan.json"]
    write_text(tmp_path / "plan.json", "{}")
    assert names(tmp_path) == [".plan.json.shear-ir-mine", "plan.json"]


def test_a_folder_that_takes_nothing_new_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(SaveError, match="out cannot be written: Read-only file system"):
        refuse_existing(tmp_path / "out", force=False)
    with pytest.raises(SaveError, match="cannot be written: File name too long"):
        refuse_existing(tmp_path / ("x" * 300), force=False)
