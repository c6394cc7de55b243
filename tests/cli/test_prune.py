"""Pruning from the command line: what is written, what is said, what is refused, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shear_ir as sir
from shear_passes.importance import blind_costs
from tests.cli.conftest import TOKENIZER, Shear

MLP = "tests.cli.factories:mlp"


def test_what_prune_writes_is_loaded_by_stock_transformers(pruned: Path, llama: Path) -> None:
    ids = torch.arange(12)[None]
    stock = AutoModelForCausalLM.from_pretrained(pruned).eval()
    assert stock.num_parameters() < AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    assert torch.equal(stock(ids).logits, sir.load(pruned)(ids).logits)


def test_tokenizer_files_are_carried_and_nothing_else(pruned: Path) -> None:
    assert {name: (pruned / name).read_text() for name in TOKENIZER} == TOKENIZER
    assert not (pruned / "code.py").exists()
    assert not (pruned / "notes.md").exists()


def test_verify_agrees_with_prune(shear: Shear, llama: Path, pruned: Path) -> None:
    ran = shear("verify", llama, pruned)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("sound: max abs diff ")
    assert "20.0% of the parameters are gone (4 groups cut)" in ran.out


def test_verify_exits_with_1_when_a_weight_has_changed(shear: Shear, llama: Path, pruned: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in pruned.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    ran = shear("verify", llama, changed, "--json")
    assert ran.code == 1
    assert ran.json["sound"] is False


def test_a_plan_for_another_model_is_refused(shear: Shear, pruned: Path, tmp_path: Path) -> None:
    assert "the plan was made for another model" in shear("verify", MLP, pruned).sentence
    refused = shear("prune", MLP, "--plan", pruned / "plan.json", "-o", tmp_path / "out").sentence
    assert "the plan was made for another model" in refused
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_changed(shear: Shear, tmp_path: Path) -> None:
    ran = shear("prune", MLP, "--ratio", "0.25", "-o", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    for said in (
        "MLP, sheared", "parameters", "bytes", "FLOPs per sample", "cut    ffn: 20 to 15 units in 1 group",
        "check  sound: max abs diff", "stock  no (not a transformers model): shear_ir.load(OUT, model=...) does", "time   loading",
        f"wrote  {tmp_path / 'out'}",
    ):  # fmt: skip
        assert said in ran.out


def test_a_model_of_ones_own_is_verified_against_its_factory(shear: Shear, tmp_path: Path) -> None:
    assert shear("prune", MLP, "--ratio", "0.25", "-o", tmp_path / "out", "--no-verify").code == 0
    assert shear("verify", MLP, tmp_path / "out").code == 0


def test_a_sheared_model_is_sheared_again_and_the_plans_are_one(
    shear: Shear, llama: Path, pruned: Path, tmp_path: Path
) -> None:
    uneven = (
        "prune",
        pruned,
        "--ratio",
        "0.1",
        "--allocation",
        "isomorphic",
        "--only",
        "*.mlp",
        "--kinds",
        "ffn",
        "-o",
        tmp_path / "b",
    )
    ran = shear(*uneven)
    assert ran.code == 0
    assert "stock  no (no config of the class has these sizes)" in ran.out
    assert shear("verify", llama, tmp_path / "b").code == 0


def test_json_is_all_there_is_on_stdout(shear: Shear, llama: Path, tmp_path: Path) -> None:
    ran = shear("prune", llama, "--ratio", "0.2", "-o", tmp_path / "out", "--json", "--dtype", "bfloat16")
    document = ran.json
    assert ran.code == 0
    assert document["after"]["parameters"] < document["before"]["parameters"]
    assert document["verified"]["sound"] is True
    assert document["stock"] is True
    assert list(document["seconds"]) == [
        "loading", "tracing", "analysing", "selecting", "shearing", "verifying", "saving"
    ]  # fmt: skip
    assert document["warnings"] == [blind_costs("magnitude")]
    assert ran.err == f"warning: {document['warnings'][0]}\n"


def test_a_dry_run_plans_and_writes_the_plan_alone(shear: Shear, tmp_path: Path) -> None:
    ran = shear("prune", MLP, "--ratio", "0.1", "--dry-run", "--plan-out", tmp_path / "plan.json", "-o", tmp_path / "o")
    assert ran.code == 0
    assert "MLP, planned" in ran.out
    assert "stock  no (not a transformers model)" in ran.out
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    again = shear("prune", MLP, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", "--json")
    assert again.json["ratio"] == sir.Plan.load(tmp_path / "plan.json").ratio


def test_a_config_alone_is_planned_in_order_and_not_pruned(shear: Shear, config_only: Path, tmp_path: Path) -> None:
    ran = shear("prune", config_only, "--ratio", "0.2", "--dry-run", "--json")
    assert ran.json["options"]["importance"] == "order"
    assert ran.json["stock"] is True
    refused = shear("prune", config_only, "--ratio", "0.2", "-o", tmp_path / "out").sentence
    assert refused.endswith("has no weights, only a config: it can be planned (--dry-run), not pruned")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone_without_force(shear: Shear, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ("prune", MLP, "--ratio", "0.25", "-o", out)
    assert shear(*first).code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert shear(*first).sentence == f"{out} exists already: choose another folder, or --force to replace it"
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert shear("prune", MLP, "--ratio", "0.5", "-o", out, "--force").code == 0
    assert (out / "plan.json").read_bytes() != before["plan.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_others_is_not_replaced_even_with_force(shear: Shear, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    refused = shear("prune", MLP, "--ratio", "0.2", "-o", tmp_path / "thesis", "--force").sentence
    assert refused.endswith("was not written by shear-ir, so it is not replaced even with --force")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["shear_backends.store.model.save_file", "shear_backends.store.folder.os.rename"])
def test_a_full_disk_leaves_nothing(shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(place, _full)
    ran = shear("prune", MLP, "--ratio", "0.25", "-o", tmp_path / "out")
    assert ran.sentence == f"{tmp_path / 'out'} cannot be written: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert shear("prune", MLP, "--ratio", "0.25", "-o", out).code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    rename = os.rename

    def once(source: Any, target: Any) -> None:
        # The old folder goes aside and comes back; the new one does not get in.
        if Path(target) == out and Path(source).name != "replaced":
            _full()
        rename(source, target)

    monkeypatch.setattr("shear_backends.store.folder.os.rename", once)
    monkeypatch.setattr("shear_backends.store.folder._exchanged", lambda one, other: False)
    assert shear("prune", MLP, "--ratio", "0.5", "-o", out, "--force").code == 2
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unsound_result_is_not_saved(shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shear_tools.api import pipeline

    right = pipeline.shear

    def wrong(*args: Any, **kwargs: Any) -> Any:
        small = right(*args, **kwargs)
        with torch.no_grad():
            small.down.bias.add_(1)
        return small

    monkeypatch.setattr(pipeline, "shear", wrong)
    ran = shear("prune", MLP, "--ratio", "0.25", "-o", tmp_path / "out")
    assert ran.sentence.startswith("the sheared model differs from the masked original by 1 ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "x"), "give either --ratio or --plan, which say what goes"),
        (("--ratio", "0.2", "--plan", "p.json", "-o", "x"), "give either --ratio or --plan, which say what goes"),
        (("--plan", "p.json", "--only", "a", "--seed", "1", "-o", "x"), "leave out --only, --seed"),
        (("--ratio", "1.5", "-o", "x"), "--ratio is a share of the parameters between 0 and 1, not 1.5"),
        (("--ratio", "nan", "-o", "x"), "--ratio is a share of the parameters between 0 and 1, not nan"),
        (("--ratio", "0.2"), "give -o OUT, the folder to write, or --dry-run"),
        (("--ratio", "0.2", "-o", "no/such/out"), "the folder no/such does not exist"),
        (("--ratio", "0.2", "--dry-run", "--plan-out", "plan.txt"), "plan.txt must end in .json"),
        (("--ratio", "0.2", "-o", "x", "--importance", "magnitud"), "no importance criterion 'magnitud'"),
        (("--plan", "no.json", "-o", "x"), "the plan no.json cannot be read"),
        (("--ratio", "some", "-o", "x"), "Invalid value for '--ratio'"),
        (
            ("--ratio", "0.2", "-o", "x", "--round-to", "0"),
            "--round-to takes a number from 1 up, as in 64 or ffn=64, not ",
        ),
        (("--ratio", "0.2", "-o", "x", "--dtype", "float8"), "Invalid value for '--dtype'"),
        (("--ratio", "0.2", "-o", "x", "--fast"), "No such option: --fast"),
    ],
)
def test_what_can_be_refused_early_is(
    shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in shear("prune", "tests.cli.factories:never_called", *arguments).sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ratio", "0.99"), "a ratio of 0.99 cannot be reached"),
        (("--ratio", "0.2", "--skip", "encoder.*"), "the pattern 'encoder.*' matches no module"),
        (("--ratio", "0.2", "--kinds", "expert"), "the model has no expert groups"),
        (("--ratio", "0.0001"), "a ratio of 0.0001 removes nothing"),
    ],
)
def test_what_the_model_cannot_give_is_refused(
    shear: Shear, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = shear("prune", "tests.cli.factories:other", *arguments, "-o", tmp_path / "out")
    assert said in ran.sentence
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_plan_is_refused(shear: Shear, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"format": "shear-ir plan 1"}))
    refused = shear("prune", MLP, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out").sentence
    assert refused.startswith("this is not a plan: ")


def test_a_graph_is_written_and_verified(shear: Shear, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = shear("prune", llama, "--ratio", "0.2", "--backend", "graph", "-o", out)
    assert ran.code == 0
    assert "stock  no (a graph, and no module of its class): shear_ir.load(OUT) does" in ran.out
    assert {name: (out / name).read_text() for name in TOKENIZER} == TOKENIZER
    checked = shear("verify", llama, out)
    assert (checked.code, checked.err) == (0, "")
    refused = shear("prune", llama, "--ratio", "0.2", "--backend", "tree", "-o", tmp_path / "other").sentence
    assert refused == "there is no backend 'tree'; there are module and graph"
