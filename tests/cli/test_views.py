"""groups, dump, visualize: what is in a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Shear

MLP = "tests.cli.factories:mlp"


def test_groups_are_a_table_and_the_frozen_ones_a_count(shear: Shear, llama: Path) -> None:
    ran = shear("groups", llama)
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["ffn0", "ffn", "44", "3", "96", "4,224", "model.layers.0.mlp", "prunable"] in rows
    assert "12 prunable, 4 frozen (--all shows them)" in ran.out
    assert "frozen:" not in ran.out


def test_all_shows_the_frozen_groups_with_their_reasons(shear: Shear) -> None:
    ran = shear("groups", MLP, "--all")
    assert "frozen: " in ran.out
    assert "\n1 prunable, 2 frozen\nshear-ir explain MODEL NAME says " in ran.out


def test_groups_of_a_kind(shear: Shear, llama: Path) -> None:
    listed = shear("groups", llama, "--kind", "ffn", "--kind", "kv_head", "--json").json["groups"]
    assert [g["name"] for g in listed] == ["kv0", "ffn0", "kv1", "ffn1"]
    refused = shear("groups", MLP, "--kind", "expert").sentence
    assert refused == "the model has no expert groups; it has ffn, other"


def test_slices_say_which_indices_a_unit_owns(shear: Shear, llama: Path) -> None:
    shown = shear("groups", MLP, "--slices", "ffn").out
    assert "down.weight     1   ffn:20   0: [0, 1)  1: [1, 2)  …  19: [19, 20)" in shown
    pair = shear("groups", llama, "--slices", "r", "--json").json["slices"]
    keys = next(s for s in pair if s["parameter"] == "model.layers.0.self_attn.k_proj.weight")
    assert keys["axes"] == "kv0:2 * (r:3 | r:3)"
    assert keys["units"] == [[[a, a + 1] for a in range(i, 12, 3)] for i in range(3)]
    assert shear("groups", MLP, "--slices", "ffn7").sentence == "the model has no group ffn7; it has ffn"


def test_dump_prints_the_program_or_writes_it(shear: Shear, tmp_path: Path) -> None:
    shown = shear("dump", MLP)
    assert "\n@gate.weight : f32[ffn:20, " in shown.out
    assert shear("dump", MLP, "-o", tmp_path / "mlp.txt").out == ""
    assert (tmp_path / "mlp.txt").read_text() == shown.out
    assert shear("dump", MLP, "--json").json["text"] + "\n" == shown.out
    assert (
        shear("dump", MLP, "-o", tmp_path / "no" / "a.txt").sentence == f"the folder {tmp_path / 'no'} does not exist"
    )


def test_dump_prints_an_adapted_layer_as_one_operator(shear: Shear) -> None:
    text = shear("dump", "tests.cli.factories:adapted").out
    assert sum(" = lora.linear(" in line for line in text.splitlines()) == 2
    assert "A=[@gate.lora_A.default.weight], B=[@gate.lora_B.default.weight], scale=[2.6666666666666665])" in text
    assert "aten.add" not in text


def test_visualize_draws_and_replaces_a_picture(shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shear("prune", MLP, "--ratio", "0.2", "--dry-run", "--plan-out", "plan.json")
    assert shear("visualize", MLP, "--group", "ffn", "--plan", "plan.json", "-o", "a.dot").out == "wrote a.dot\n"
    first = Path("a.dot").read_text()
    assert first.startswith("digraph")
    assert shear("visualize", MLP, "-o", "a.dot", "--json").json["out"] == "a.dot"
    assert Path("a.dot").read_text() != first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "a.txt"), "a.txt must end in .svg or .png or .pdf or .dot"),
        (("-o", "no/a.svg"), "the folder no does not exist"),
        (("--plan", "no.json"), "the plan no.json cannot be read"),
        (("--group", "ffn7"), "the model has no group 'ffn7'"),
        (("--layers", "1-0"), "layers '1-0'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in shear("visualize", MLP, *arguments).sentence
    assert list(tmp_path.iterdir()) == []
