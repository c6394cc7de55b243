"""``prune --repair``, ``--rotate`` and ``--add-biases``: other weights, sheared and saved as stock models."""

from __future__ import annotations

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
    folder = tmp_path_factory.mktemp("repaired")
    write_model(folder / "dense")
    write_data(folder)
    return folder


def test_a_repaired_model_is_what_the_library_makes(shear: Shear, place: Path, tmp_path: Path) -> None:
    asked = ("--ratio", "0.3", "--data", place / "data.yaml", "--samples", "6", "--device", "cpu")
    ran = shear("prune", place / "dense", *asked, "--repair", "least-squares", "-o", tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["verified"]["sound"]
    model = build("llama_gqa")
    batches, _ = calibration_batches(place / "data.yaml", tokenizer(), samples=6)
    plan = sir.plan(sir.trace(model), ratio=0.3, data=batches)
    small = sir.shear(sir.repair(model, plan, data=batches), plan)
    saved = dict(sir.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(saved[name], tensor) for name, tensor in small.named_parameters())
    refused = shear("verify", place / "dense", tmp_path / "out")
    assert refused.code == 2
    assert "prune changed them by --repair, and compared the result with the model it had changed" in refused.sentence


def test_a_rotated_stream_gets_biases_and_loses_its_last_directions(shear: Shear, place: Path, tmp_path: Path) -> None:
    asked = ("--rotate", "residual", "--add-biases", "--data", place / "data.yaml", "--samples", "4", "--device", "cpu")
    cut = ("--ratio", "0.2", "--kinds", "residual", "--importance", "order", "--round-to", "8")
    ran = shear("prune", place / "dense", *asked, *cut, "-o", tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert (ran.json["verified"]["sound"], ran.json["stock"]) == (True, True)
    assert (ran.json["options"]["rotate"], ran.json["options"]["add_biases"]) == ("residual", True)


def test_what_an_untied_table_costs_is_said(shear: Shear, place: Path, tmp_path: Path) -> None:
    model = build("llama_gqa")
    model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    model.tie_weights()  # type: ignore[operator]
    model.save_pretrained(tmp_path / "tied")  # type: ignore[operator]
    for file in (place / "dense").glob("token*"):
        (tmp_path / "tied" / file.name).write_bytes(file.read_bytes())
    asked = ("--rotate", "residual", "--data", place / "data.yaml", "--samples", "4", "--device", "cpu")
    cut = ("--ratio", "0.2", "--kinds", "residual", "--importance", "order", "--round-to", "8")
    ran = shear("prune", tmp_path / "tied", *asked, *cut, "-o", tmp_path / "out", "--json")
    (told,) = ran.json["warnings"]
    assert "is untied, since it alone reads a norm" in told
    assert f"{model.get_input_embeddings().weight.numel():,} parameters more" in told  # type: ignore[operator,union-attr]
    assert told in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--repair", "least-squares"), "--repair least-squares looks at data: give --data FILE"),
        (("--rotate", "residual"), "--rotate residual looks at data: give --data FILE"),
        (("--repair", "glue"), "Invalid value for '--repair'"),
    ],
)
def test_what_needs_data_is_refused_early(
    shear: Shear, place: Path, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    ran = shear("prune", place / "dense", "--ratio", "0.2", *given, "-o", tmp_path / "out")
    assert ran.code == 2
    assert said in ran.sentence
