"""The faults of tools/mutate.py: each can still be put in, and one of them is tried here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mutate


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda m: m.what)
def test_a_fault_fits_the_code_as_it_is(mutation: mutate.Mutation) -> None:
    text = (mutate.ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.area in mutate.AREAS


def test_there_are_faults_of_every_area_and_twenty_in_all() -> None:
    assert {m.area for m in mutate.MUTATIONS} == set(mutate.AREAS)
    assert len(mutate.MUTATIONS) >= 20


def test_a_fault_is_found_and_mended_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mutation,) = [m for m in mutate.MUTATIONS if m.what == "attention is scaled by the new width"]
    tree = mutate.copied(tmp_path / "tree")
    one = "tests/ops/test_resize.py::test_a_cut_graph_is_the_masked_original[scaled_dot_product_attention]"
    monkeypatch.setattr(mutate, "AREAS", {**mutate.AREAS, "resize": (one,)})
    found = mutate.tried(mutation, tree, 300.0)
    assert (found.killed, found.by) == (True, one)
    assert (tree / mutation.file).read_bytes() == (mutate.ROOT / mutation.file).read_bytes()


def test_a_fault_that_no_longer_fits_is_said(tmp_path: Path) -> None:
    tree = tmp_path
    (tree / "a.py").write_text("x = 1\n")
    found = mutate.tried(mutate.Mutation("resize", "none", "a.py", "y = 1", "y = 2"), tree, 1.0)
    assert found.killed is None
    assert "stands 0 times" in found.by
