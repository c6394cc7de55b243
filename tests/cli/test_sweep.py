"""``shear-ir sweep``: a table, a picture, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shear
from tests.workflow.tiny import write_data, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_model(folder / "dense")
    write_data(folder)
    return folder


def test_the_command_line_prints_a_table_and_draws(shear: Shear, place: Path, tmp_path: Path) -> None:
    asked = ("sweep", place / "dense", "--data", place / "data.yaml", "--samples", "4", "--device", "cpu")
    ran = shear(*asked, "--ratio", "0.3", "--importance", "magnitude", "--repair", "none", "--plot", tmp_path / "a.svg")
    assert ran.code == 0
    assert "magnitude" in ran.out
    assert (tmp_path / "a.svg").is_file()
    said = "a ratio is a share of the parameters between 0 and 1, not 1.3"
    assert said in shear(*asked, "--ratio", "1.3").sentence
    assert "there is no allocation 'fair'; there are uniform" in shear(*asked, "--allocation", "fair").sentence
    said = "--knowledge FILE and --allocation by-knowledge go together: give both or neither"
    assert said in shear(*asked, "--knowledge", place / "data.yaml").sentence
    assert said in shear("prune", *asked[1:], "--ratio", "0.2", "--allocation", "by-knowledge", "--dry-run").sentence
    assert "there is no repair 'glue'; there are least-squares" in shear(*asked, "--repair", "glue").sentence


def test_what_prune_may_be_told_a_sweep_may_too(shear: Shear, place: Path) -> None:
    asked = ("sweep", place / "dense", "--data", place / "data.yaml", "--samples", "4", "--device", "cpu", "--json",
             "--importance", "magnitude", "--repair", "none", "--ratio", "0.5", "--budget", "kv_bytes")  # fmt: skip
    (point,) = json.loads(shear(*asked, "--kinds", "kv_head").out)["points"]
    dense = json.loads(shear(*asked, "--kinds", "kv_head").out)["dense"]["costs"]
    assert point["costs"]["kv_bytes"] == dense["kv_bytes"] / 2
    refused = shear(*asked, "--kinds", "kv_head", "--skip", "*.layers.0.*")
    assert "cannot be reached" in refused.sentence
