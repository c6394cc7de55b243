"""Pictures: what is in them, written whole, the same bytes for the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from shear_ir.errors import SaveError
from shear_tools.workflow.plots import plot_cuts, plot_knowledge, plot_losses
from shear_training.evaluate import Loss
from tests.workflow.drawn import KNOWLEDGE, PLAN

LOSSES = {
    "dense": {"code": Loss(2.0, 9), "prose": Loss(3.0, 9)}, "pruned": {"code": Loss(2.5, 9), "prose": Loss(math.nan, 9)},
}  # fmt: skip
DRAW: dict[str, Callable[[Path], None]] = {
    "knowledge": lambda path: plot_knowledge(KNOWLEDGE, path),
    "cuts": lambda path: plot_cuts(PLAN, KNOWLEDGE, path),
    "losses": lambda path: plot_losses(LOSSES, path),
}


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_same_numbers_are_the_same_bytes(tmp_path: Path, name: str, suffix: str) -> None:
    first, second = (tmp_path / f"{n}{suffix}" for n in "ab")
    DRAW[name](first)
    DRAW[name](second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:4] == {".svg": b"<?xm", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix]
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("name", DRAW)
def test_what_was_there_stays_when_drawing_fails(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.svg"
    path.write_text("old")

    def fail(self: Figure, file: Path, **options: object) -> None:
        Path(file).write_text("half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(SaveError, match=r"old\.svg cannot be written: no space"):
        DRAW[name](path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_every_group_and_every_source_is_named(tmp_path: Path) -> None:
    for name, words in {
        "knowledge": ["kv0", "ffn0", "kv1", "ffn1", "left whole", "not a number", "0.25, 0.5"],
        "cuts": ["kv0", "ffn0", "kv1", "ffn1"],
        "losses": ["code", "prose", "dense", "pruned"],
    }.items():
        DRAW[name](tmp_path / "picture.svg")
        text = (tmp_path / "picture.svg").read_text()
        assert [word for word in words if f">{word}" not in text and word not in text] == []


def test_nothing_finite_is_drawn_all_the_same(tmp_path: Path) -> None:
    lost = tuple(replace(group, deviations=(math.inf,)) for group in KNOWLEDGE.groups)
    plot_knowledge(replace(KNOWLEDGE, groups=lost), tmp_path / "lost.svg")
    assert (tmp_path / "lost.svg").read_text().count("not a number") == 4
