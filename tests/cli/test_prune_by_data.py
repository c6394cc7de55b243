"""``prune --data``: units are judged by text, of a data.yaml or of one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import shear_ir as sir
from shear_tools.workflow.calibration import calibration_batches
from tests.cli.conftest import Shear
from tests.workflow.tiny import tokenizer, write_data, write_model
from tests.zoo import build


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "dense")
    write_data(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "meant"), [((), "flap"), (("--importance", "taylor{order=mixed}"), "taylor{order=mixed}")]
)
def test_units_are_judged_by_data(
    shear: Shear, place: Path, tmp_path: Path, given: tuple[str, ...], meant: str
) -> None:
    ran = shear("prune", place / "dense", "--ratio", "0.3", "--data", place / "data.yaml", "--samples", "6",
                "--device", "cpu", *given, "-o", tmp_path / "out", "--json")  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    plan = sir.Plan.load(tmp_path / "out" / "plan.json")
    assert plan.options["importance"] == meant
    batches, _ = calibration_batches(place / "data.yaml", tokenizer(), samples=6)
    model = build("llama_gqa")
    wanted = sir.plan(sir.trace(model), ratio=0.3, importance=meant, data=batches)
    assert json.loads(plan.to_json())["kept"] == json.loads(wanted.to_json())["kept"]


def test_samples_come_from_all_sources_alike(place: Path) -> None:
    batches, sources = calibration_batches(place / "data.yaml", tokenizer(), samples=11, batch=4)
    assert sum(len(b["input_ids"]) for b in batches) == 11
    assert max(len(b["input_ids"]) for b in batches) == 4
    assert min(len(rows) for rows in sources.values()) >= 5
    again, _ = calibration_batches(place / "data.yaml", tokenizer(), samples=11, batch=4)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_one_file_is_read_whole(place: Path) -> None:
    batches, _ = calibration_batches(place / "texts.jsonl", tokenizer(), samples=10_000)
    assert sum(int((b["labels"] != -100).sum()) for b in batches) == 40 * 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--importance", "wanda"), "wanda looks at data: give --data FILE, or --importance magnitude"),
        (("--samples", "3"), "--samples is a number of rows of --data: give --data FILE"),
        (("--importance", "wanda{rows=max}", "--data", "x.txt"), "wanda takes rows=mean|sum, not rows=max"),
    ],
)
def test_a_criterion_and_its_data_are_refused_early(
    shear: Shear, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    refused = shear("prune", "tests.cli.factories:never_called", "--ratio", "0.2", "-o", tmp_path / "x", *arguments)
    assert said in refused.sentence


def test_a_model_without_a_tokenizer_or_data_that_is_not_there_is_refused(
    shear: Shear, place: Path, tmp_path: Path
) -> None:
    options = ("--ratio", "0.2", "-o", tmp_path / "out", "--data")
    assert (
        "no folder with a tokenizer"
        in shear("prune", "tests.cli.factories:mlp", *options, place / "data.yaml").sentence
    )
    assert "there is no data file" in shear("prune", place / "dense", *options, place / "none.txt").sentence
    assert list(tmp_path.iterdir()) == []
