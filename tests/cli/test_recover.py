"""``eval`` and ``recover`` from the command line: what they print, write, refuse, and that a stopped run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shear_ir as sir
from shear_tools.cli import main
from shear_training import harness
from tests.cli.conftest import Shear
from tests.workflow.tiny import tokenizer, write_data, write_model

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "recovery": {
        "rank": 4,
        "lr": 0.02,
        "batch": 4,
        "rows_per_round": 16,
        "epochs": 1,
        "max_rounds": 2,
        "save_steps": 2,
    },
    "stages": {"tuning": {"max_rounds": 1}},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and rounding follows the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``dense``, ``small``, ``data.yaml`` and ``recipe.yaml``."""
    folder = tmp_path_factory.mktemp("recover")
    write_model(folder / "dense")
    write_data(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(folder / "dense"), "--ratio", "0.2", "-o", str(folder / "small")])
    assert ended.value.code == 0
    return folder


def command(place: Path, out: Path, *more: str | Path) -> list[str]:
    given = ["recover", place / "small", "--data", place / "data.yaml", "--recipe", place / "recipe.yaml",
             "--device", "cpu", "-o", out, *more]  # fmt: skip
    return [str(each) for each in given]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def recovered(place: Path) -> Path:
    out = place / "recovered"
    with pytest.raises(SystemExit) as ended:
        main(command(place, out, "--dense", place / "dense"))
    assert ended.value.code == 0
    return out


def test_what_recover_writes_is_better_and_as_stock_as_before(shear: Shear, place: Path, recovered: Path) -> None:
    told = json.loads((recovered / "recovery.json").read_text())
    assert list(told["losses"]) == ["dense", "sheared", "reading", "tuning"]
    assert [len(stage["rounds"]) for stage in told["stages"]] == [2, 1]
    assert told["losses"]["tuning"]["texts"]["nll"] < told["losses"]["sheared"]["texts"]["nll"]
    assert told["stock"] is True
    assert (
        AutoModelForCausalLM.from_pretrained(recovered).num_parameters() == sir.load(place / "small").num_parameters()
    )
    assert not (place / "recovered.work").exists()
    again = shear("eval", recovered, "--data", place / "data.yaml", "--json").json
    assert again["sources"]["texts"] == pytest.approx(told["losses"]["tuning"]["texts"], rel=1e-5)


def test_a_recovered_model_is_still_one_of_shear_irs(shear: Shear, recovered: Path, place: Path) -> None:
    assert sir.Plan.load(recovered / "plan.json").to_json() == sir.Plan.load(place / "small" / "plan.json").to_json()
    assert (recovered / "tokenizer.json").read_bytes() == (place / "dense" / "tokenizer.json").read_bytes()


def test_losses_from_a_file_do_as_well_as_the_dense_model(
    shear: Shear, place: Path, recovered: Path, tmp_path: Path
) -> None:
    measured = shear("eval", place / "dense", "--data", place / "data.yaml", "--json")
    (tmp_path / "dense.json").write_text(measured.out)
    ran = shear(*command(place, tmp_path / "out", "--dense-losses", tmp_path / "dense.json"))
    assert (ran.code, ran.err) == (0, "")
    for said in (
        "reading: 2 rounds, ",
        "tuning: 1 rounds, ",
        "stopped: max rounds",
        "stock: yes",
        f"wrote {tmp_path / 'out'}",
    ):
        assert said in ran.out
    ours, theirs = weights(tmp_path / "out"), weights(recovered)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_with_the_same_bytes(place: Path, recovered: Path, tmp_path: Path) -> None:
    arguments = command(place, tmp_path / "out", "--dense", place / "dense")
    code = (
        "import os, signal, sys, torch; from shear_tools.cli import console, main; torch.set_num_threads(1)\n"
        "def told(self, what, done, total):\n"
        "    if what == 'reading: round 2' and done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"console.Told.__call__ = told; main({arguments!r})"
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools"))
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "recovery-0-reading" / "round-2").is_dir()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (recovered / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_adapters_are_kept_beside_the_model_when_asked(shear: Shear, place: Path, tmp_path: Path) -> None:
    ran = shear(*command(place, tmp_path / "out", "--dense", place / "dense", "--keep-adapters", "--rounds", "1"))
    assert ran.code == 0
    assert (tmp_path / "out" / "adapters" / "default" / "adapter_model.safetensors").is_file()
    told = json.loads((tmp_path / "out" / "recovery.json").read_text())
    measured = shear("eval", tmp_path / "out", "--data", place / "data.yaml", "--json").json
    assert measured["sources"]["asked"]["nll"] == pytest.approx(told["losses"]["tuning"]["asked"]["nll"], rel=1e-5)


def test_options_hold_for_every_stage_and_json_is_all_there_is(shear: Shear, place: Path, tmp_path: Path) -> None:
    more = ("--dense", place / "dense", "--uniform", "--rounds", "1", "--seed", "3", "--keep-work", "--json")
    ran = shear(*command(place, tmp_path / "out", *more))
    assert (ran.code, ran.err) == (0, "")
    document = ran.json
    assert [len(stage["rounds"]) for stage in document["stages"]] == [1, 1]
    assert document["stages"][0]["rounds"][0]["weights"] == {"texts": 0.5, "asked": 0.5}
    assert (tmp_path / "out.work" / "recovery-1-tuning" / "state.json").is_file()
    # The file does not say where it lies.
    assert document == json.loads((tmp_path / "out" / "recovery.json").read_text()) | {"out": str(tmp_path / "out")}


def test_the_work_of_another_run_is_refused(shear: Shear, place: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    given = ("--dense", place / "dense", "--work", work, "--rounds", "1", "--keep-work")
    assert shear(*command(place, tmp_path / "out", *given)).code == 0
    refused = shear(*command(place, tmp_path / "other", *given, "--seed", "4")).sentence
    assert refused.startswith(f"{work} holds a run that was begun with other stages")
    assert not (tmp_path / "other").exists()


def test_a_table_says_what_each_source_loses(shear: Shear, place: Path) -> None:
    ran = shear("eval", place / "dense", "--data", place / "data.yaml")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    (texts,) = [line for line in lines if line[:1] == ["texts"]]
    document = shear("eval", place / "dense", "--data", place / "data.yaml", "--json").json
    found = document["sources"]["texts"]
    assert texts == ["texts", str(found["tokens"]), f"{found['nll']:.4f}", f"{found['perplexity']:.2f}"]
    assert document["tasks"] == []


def test_a_loss_that_is_no_number_is_said(shear: Shear, place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)  # finite, and what it is multiplied with is not
    model.save_pretrained(tmp_path / "broken")
    tokenizer().save_pretrained(tmp_path / "broken")
    done = shear("eval", tmp_path / "broken", "--data", place / "data.yaml", "--json")
    assert done.code == 0
    assert "the loss on " in done.err
    assert "is no number" in done.err
    assert all(each["nll"] is None for each in json.loads(done.out)["sources"].values())


def test_a_file_of_rows_is_measured_whole(shear: Shear, place: Path) -> None:
    rows = len((place / "texts.jsonl").read_text().splitlines())
    ran = shear("eval", place / "small", "--data", place / "texts.jsonl", "--json")
    # A text is 18 letters between two end tokens; the first token of each window of 256 is predicted from nothing.
    tokens = rows * 20
    assert ran.json["sources"]["texts"]["tokens"] == tokens - -(-tokens // 256)


def scripted(monkeypatch: Any, answer: Callable[..., Any]) -> None:
    monkeypatch.setattr(harness, "require_harness", lambda: None)
    monkeypatch.setattr(harness, "run_tasks", answer)


def test_tasks_are_told_beside_losses(shear: Shear, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def answer(model: Any, made: Any, tasks: Any, **options: Any) -> list[harness.TaskScore]:
        asked.update(tasks=tasks, **options, words=len(made) == len(tokenizer()))
        return [harness.TaskScore("arc_easy", "acc", 0.5, 0.01), harness.TaskScore("piqa", "acc_norm", 0.25, None)]

    scripted(monkeypatch, answer)
    ran = shear("eval", place / "dense", "--tasks", "arc_*,piqa", "--tasks", "boolq", "--limit", "7", "--batch", "3")
    assert asked == {"tasks": ["arc_*", "piqa", "boolq"], "limit": 7, "batch": 3, "words": True}
    assert [line.split() for line in ran.out.splitlines()][-3:-1] == [
        ["arc_easy", "acc", "0.5000", "±", "0.0100"], ["piqa", "acc_norm", "0.2500"]
    ]  # fmt: skip


def test_measures_are_read_off_the_harness_names() -> None:
    results = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25, "f1_stderr,strict": "N/A"}
    assert harness._scores("t", results) == [
        harness.TaskScore("t", "acc", 0.5, 0.1),
        harness.TaskScore("t", "f1,strict", 0.25, None),
    ]


def test_a_missing_harness_is_said_before_anything_is_loaded(shear: Shear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = shear("eval", "no/such/model", "--tasks", "piqa").sentence
    assert refused.endswith("which is not installed: pip install 'shear-ir[eval]'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "{m}/dense"), "give --data FILE, --tasks TASK or both"),
        (("eval", "{m}/dense", "--data", "no.yaml"), "the data file no.yaml cannot be read"),
        (("eval", "{m}/none", "--data", "{m}/data.yaml"), "there is no folder"),
        (("recover", "{m}/small", "--data", "{m}/data.yaml", "-o", "x"), "give either --dense MODEL or --dense-losses"),
        (("recover", "{m}/small", "--data", "{m}/data.yaml", "-o", "no/x", "--dense", "d"), "the folder no does not exist"),
        (("recover", "{m}/small", "--data", "{m}/data.yaml", "-o", "{m}/small", "--dense", "d"), "exists already"),
        (("recover", "{m}/dense", "--data", "{m}/data.yaml", "-o", "x", "--dense", "d"), "has not been sheared"),
        (("recover", "{m}/small", "--data", "{m}/data.yaml", "-o", "x", "--dense", "d", "--lr", "-1"), "lr of a recovery"),
        (("recover", "{m}/small", "--data", "{m}/data.yaml", "-o", "x", "--dense-losses", "{m}/data.yaml"), "cannot be read"),
        (("recover", "{m}/small", "--data", "{m}/none.txt", "-o", "x", "--dense", "d"), "there is no data file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(
    shear: Shear, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in shear(*(a.format(m=place) for a in arguments)).sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"validation": 10_000}, "fewer than the 10000 that validation asks for"),
        ({"sources": {"texts": {"path": "blank.jsonl"}}, "stages": None}, "source texts has no usable row"),
    ],
)
def test_data_that_cannot_be_used_names_the_source(
    shear: Shear, place: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    data = write_data(tmp_path, **change)
    ran = shear(
        "recover",
        place / "small",
        "--data",
        data,
        "--dense",
        place / "dense",
        "--device",
        "cpu",
        "-o",
        tmp_path / "out",
    )
    assert said in ran.sentence
    assert not (tmp_path / "out").exists()


def test_losses_that_lack_a_source_are_refused(shear: Shear, place: Path, tmp_path: Path) -> None:
    (tmp_path / "dense.json").write_text('{"texts": 2.0}')
    refused = shear(*command(place, tmp_path / "out", "--dense-losses", tmp_path / "dense.json")).sentence
    assert refused == "the losses of the dense model lack the source asked"
