"""The bench of random programs: it counts what it has checked, goes on where it was, and shows what breaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import fuzz
from tests.oracle.fuzz import check as checking
from tests.oracle.fuzz.check import Broken, Seen
from tests.oracle.fuzz.draft import Sketch


def run(out: Path, *options: str) -> tuple[int, str]:
    import typer

    app = typer.Typer()
    app.command()(fuzz.main)
    result = CliRunner().invoke(app, ["--out", str(out), *options])
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CHUNK", 2)


def test_programs_are_counted_and_those_of_earlier_runs_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []

    def check(sketch: Sketch, **_: object) -> Seen:
        checked.append(sketch.source)
        return Seen(groups=4, prunable=1, plans=2, moved=1)

    monkeypatch.setattr(checking, "check", check)
    assert run(tmp_path, "--programs", "4")[0] == 0
    code, text = run(tmp_path, "--programs", "6")
    assert code == 0
    assert len(set(checked)) == len(checked) == 6
    assert "programs checked      │ 6 (0 more do not trace)" in text
    assert "groups                │ 24, 25.0% of them prunable" in text
    assert "plans compared        │ 12, 50.0% of them moved the outputs" in text


def test_what_breaks_is_shown_small_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(sketch: Sketch, **_: object) -> Seen:
        if "nn.Linear" in sketch.source:
            raise Broken("the graph differs from the masked original by 0.5 with ffn keeping [0] of 2")
        return Seen()

    monkeypatch.setattr(checking, "check", check)
    code, text = run(tmp_path, "--programs", "4")
    assert code == 1
    assert "class Program(nn.Module):" in text
    assert "Broken: the graph differs from the masked original by 0.5" in text
    monkeypatch.setattr(checking, "check", lambda sketch, **_: Seen())
    assert run(tmp_path, "--programs", "4")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "fuzz.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["0:6:0", "0:6:1", *[line["run"] for line in lines[:2] if line["broken"]]]
