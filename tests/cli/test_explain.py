"""explain: why slices leave together, or cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Shear

MLP = "tests.cli.factories:mlp"


def test_a_proof_is_text_json_or_a_picture(shear: Shear, tmp_path: Path) -> None:
    assert "tied to @gate.weight, dim 0 [ffn:20]:" in shear("explain", MLP, "ffn").out
    (proof,) = shear("explain", MLP, "down.weight:1", "--json").json["proofs"]
    assert proof["root"] == {"value": "@down.weight", "dim": 1, "axes": "ffn:20", "part": ""}
    assert {step["operator"] for chain in proof["chains"] for step in chain["steps"]} >= {"aten.linear", "aten.mul"}
    assert Path(proof["chains"][0]["steps"][0]["line"]["file"]).name == "zoo.py"
    drawn = tmp_path / "ffn.dot"
    assert shear("explain", MLP, "ffn", "-o", drawn).out == f"wrote {drawn}\n"
    assert drawn.read_text().startswith('digraph "ffn"')


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fnn",), "the model has no group or parameter 'fnn'; near names: ffn"),
        (("down.weight:2",), "down.weight has 2 dims, counted from 0: there is no dim 2"),
        (("ffn", "-o", "a.txt"), "a.txt must end in .svg or .png or .pdf or .dot"),
    ],
)
def test_what_cannot_be_explained_is_refused(shear: Shear, arguments: tuple[str, ...], said: str) -> None:
    assert shear("explain", MLP, *arguments).sentence == said
