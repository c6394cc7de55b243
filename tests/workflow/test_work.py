"""The folder of a run: one run at a time holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shear_ir.errors import PlanError
from shear_tools.workflow.work import alone


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "out.work"
    with alone(place):
        with pytest.raises(PlanError, match="another run is working in"), alone(place):
            pass
        with alone(tmp_path / "other.work"):
            pass
    with alone(place):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / ".out.work.lock").touch()
    with alone(tmp_path / "out.work"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_first_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone(tmp_path / "out.work"):
        monkeypatch.setenv("RANK", "1")
        with alone(tmp_path / "out.work"):
            pass
