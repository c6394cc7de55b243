"""``knowledge`` and ``lorashear`` from the command line: what they print and write, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shear_tools.cli import Interrupted
from shear_tools.workflow import measure, stages
from shear_tools.workflow.recipe import load_recipe
from shear_training.knowledge import Knowledge
from tests.cli.conftest import Shear
from tests.training.tiny import adapted
from tests.workflow.tiny import RECIPE, write_data, write_model, write_recipe

GROUPS = ["kv0", "ffn0", "kv1", "ffn1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data and a recipe."""
    folder = tmp_path_factory.mktemp("lorashear")
    write_model(folder / "model")
    write_data(folder / "data")
    write_recipe(folder / "recipe.yaml")
    return folder


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 1)


def test_knowledge_prints_a_table_with_the_most_sensitive_first(shear: Shear, place: Path) -> None:
    ran = shear("knowledge", place / "model", "--data", place / "data" / "data.yaml", "--at", "0.5", "--freeze", "0.25")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines() if line.split()[:1] and line.split()[0] in GROUPS]
    assert sorted(line[0] for line in lines) == sorted(GROUPS)
    means = [float(line[5]) for line in lines]
    assert means == sorted(means, reverse=True)
    assert ran.out.count("leave whole") == 1
    assert "the whole model: 4.5574 nats per token, perplexity 95.34" in ran.out


def test_knowledge_writes_what_it_says(shear: Shear, place: Path, tmp_path: Path) -> None:
    data, out = place / "data" / "data.yaml", tmp_path / "knowledge.json"
    given = ("--data", data, "--at", "0.25", "--at", "0.75", "--rows", "2", "--json")
    ran = shear("knowledge", place / "model", *given, "-o", out, "--plot", tmp_path / "k.svg")
    found = ran.json
    kept = Knowledge.load(out)
    assert found["ratios"] == [0.25, 0.75]
    assert {g["group"]: g["deviations"] for g in found["groups"]} == {g.group: list(g.deviations) for g in kept.groups}
    assert all(g["mean"] == pytest.approx(sum(g["deviations"]) / 2) for g in found["groups"])
    assert "<svg" in (tmp_path / "k.svg").read_text()
    assert shear("knowledge", place / "model", *given, "--plot", tmp_path / "k.png").code == 0
    assert (tmp_path / "k.png").read_bytes()[:4] == b"\x89PNG"


def test_one_file_of_rows_is_data_too(shear: Shear, place: Path) -> None:
    found = shear("knowledge", place / "model", "--data", place / "data" / "texts.jsonl", "--at", "0.5", "--json")
    assert sorted(g["group"] for g in found.json["groups"]) == sorted(GROUPS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--at", "1.5"), "--at is a share of a group between 0 and 1, not 1.5"),
        (("--freeze", "2"), "--freeze is a share of the groups between 0 and 1, not 2"),
        (("--data", "NOWHERE/none.yaml"), "none.yaml cannot be read"),
        (("--data", "NOWHERE/none.jsonl"), "there is no data file"),
        (("-o", "NOWHERE/k.txt"), "k.txt must end in .json"),
        (("--plot", "NOWHERE/k.gif"), "k.gif must end in .svg or .png or .pdf"),
        (("--kinds", "luck"), "the model has no prunable group of the kinds luck"),
    ],
)
def test_knowledge_refuses_what_it_cannot_do(
    shear: Shear, place: Path, tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    given = [option.replace("NOWHERE", str(tmp_path)) for option in options]
    data = () if "--data" in options else ("--data", place / "data" / "data.yaml")
    assert said in shear("knowledge", place / "model", *data, *given).sentence
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_is_refused(shear: Shear, place: Path, config_only: Path, tmp_path: Path) -> None:
    data = place / "data" / "data.yaml"
    assert "has no weights to work with" in shear("knowledge", config_only, "--data", data).sentence
    refused = shear("lorashear", config_only, "--data", data, "-o", tmp_path / "out").sentence
    assert "has no weights to work with" in refused
    assert list(tmp_path.iterdir()) == []


def test_data_without_usable_rows_is_refused(shear: Shear, place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    for command in (("knowledge",), ("lorashear", "-o", tmp_path / "out")):
        said = shear(command[0], place / "model", *command[1:], "--data", tmp_path / "empty.jsonl").sentence
        assert "source empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def lorashear(shear: Shear, place: Path, out: Path, *options: str | Path, data: Path | None = None) -> Any:
    return shear(
        "lorashear", place / "model", "--data", data or place / "data" / "data.yaml", "--recipe", place / "recipe.yaml",
        "--ratio", "0.3", "-o", out, *options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ratio", "1.5"), "--ratio is a share of the parameters between 0 and 1, not 1.5"),
        (("--ratio", "0.99"), "0.99"),
        (("--only", "*.nothing.*"), "*.nothing.*"),
        (("--recipe", "HERE/luck.yaml"), "pruning: there is no saliency criterion 'luck'"),
        (("--recipe", "HERE/none.yaml"), "none.yaml cannot be read"),
        (
            ("--recipe", "HERE/turning.yaml"),
            "the recipe has a stage turning; the stages of the data are reading, tuning",
        ),
        (("--data", "HERE/none.yaml"), "none.yaml cannot be read"),
        (("-o", "HERE/no/out"), "the folder"),
    ],
)
def test_lorashear_refuses_what_it_cannot_do(
    shear: Shear, place: Path, tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "luck.yaml").write_text("pruning: {criteria: {luck: 1}}")
    (here / "turning.yaml").write_text("stages: {turning: {epochs: 1}}")
    before = sorted(tmp_path.rglob("*"))
    given = [option.replace("HERE", str(here)) for option in options]
    assert said in lorashear(shear, place, tmp_path / "out", *given).sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_there_is_refused(shear: Shear, place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in lorashear(shear, place, tmp_path / "out").sentence
    (tmp_path / "out" / "mine").touch()
    assert "was not written by shear-ir" in lorashear(shear, place, tmp_path / "out", "--force").sentence
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["knowledge", "lorashear"])
def test_a_gpu_that_is_not_there_is_refused(shear: Shear, place: Path, tmp_path: Path, command: str) -> None:
    out = ("-o", tmp_path / "out") if command == "lorashear" else ()
    data = place / "data" / "data.yaml"
    said = shear(command, place / "model", "--data", data, "--device", "cuda", *out).sentence
    assert said == "--device cuda: torch sees no GPU here"
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_4_bits_is_refused(shear: Shear, place: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in (place / "model").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    said = shear("lorashear", base, "--data", place / "data" / "data.yaml", "-o", tmp_path / "out").sentence
    assert "is quantised (bitsandbytes" in said
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_source_with_fewer_rows_than_are_measured_on_is_refused(shear: Shear, place: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", rows=5)
    said = lorashear(shear, place, tmp_path / "out", data=data).sentence
    assert said == "source texts has 3 rows of 48 tokens, fewer than the 4 that validation asks for"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupt_leaves_the_work_and_the_same_command_goes_on(
    shear: Shear, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "recover", interrupted)
        ran = lorashear(shear, place, tmp_path / "out", "--stock")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    # Another ratio is another run, which the folder of this one is not for.
    said = lorashear(shear, place, tmp_path / "out", "--stock", "--ratio", "0.4").sentence
    assert f"{tmp_path / 'out.work'} holds a run that was begun with other options" in said
    ran = lorashear(shear, place, tmp_path / "out", "--stock")
    assert ran.code == 0, ran.err
    assert "20,192 parameters became 14,048 (30.4% gone)\nstock: yes\n" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines() if "%" in line][:4] == [
        "dense",
        "pruned",
        "reading",
        "tuning",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_the_recipe_of_the_tests_is_read_as_it_was_written(place: Path) -> None:
    assert load_recipe(place / "recipe.yaml").stage("tuning").max_rounds == 1


def test_stock_and_layers_of_unlike_sizes_are_refused_together(shear: Shear, place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", replace(RECIPE, knowledge=replace(RECIPE.knowledge, allocate=True)))
    asked = ("lorashear", place / "model", "--ratio", "0.3", "--data", place / "data" / "data.yaml", "--recipe", recipe)
    refused = shear(*asked, "--stock", "-o", tmp_path / "out")
    assert refused.code == 2
    assert "--stock wants layers of like sizes, and knowledge.allocate of the recipe" in refused.sentence


def test_the_tokenizer_of_an_adapter_may_be_that_of_its_base(shear: Shear, place: Path, tmp_path: Path) -> None:
    model = adapted(targets=("q_proj",))
    model.peft_config["default"].base_model_name_or_path = str(place / "model")
    model.save_pretrained(tmp_path / "adapter")
    data = place / "data" / "texts.jsonl"
    assert shear("eval", tmp_path / "adapter", "--data", data, "--json").json["sources"]
