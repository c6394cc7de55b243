"""LoRAShear as one call: what it leaves, that it can be stopped anywhere, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import shear_ir as sir
from shear_ir.errors import PlanError, SaveError
from shear_tools.workflow import measure, publish
from shear_tools.workflow import run as module
from shear_tools.workflow.calibration import batches_of
from shear_tools.workflow.recipe import Recipe
from shear_tools.workflow.run import Outcome
from shear_training.data import load_data, prepare
from shear_training.evaluate import evaluate, evaluate_sources
from shear_training.knowledge import Knowledge
from tests.training.tiny import adapted
from tests.workflow.tiny import RATIO, RECIPE, freezing, run, tokenizer, write_data
from tests.zoo import build

FILES = ["config.json", "generation_config.json", "knowledge.json", "model.safetensors", "pictures", "plan.json",
         "report.json", "report.md", "shear_ir.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


def out(made: Outcome) -> Path:
    return Path(made.saved.path)


def weights(made: Outcome) -> bytes:
    return (out(made) / "model.safetensors").read_bytes()


def told(document: Any) -> Any:
    """A report without what a clock says."""
    if isinstance(document, dict):
        return {name: told(item) for name, item in document.items() if name not in ("speed", "seconds")}
    return [told(item) for item in document] if isinstance(document, list | tuple) else document


class Stopped(Exception):
    pass


def test_the_folder_holds_a_model_a_report_and_all_that_they_need(whole: Outcome) -> None:
    assert sorted(p.name for p in out(whole).iterdir() if p.name != "README.md") == FILES
    assert sorted(p.name for p in (out(whole) / "pictures").iterdir()) == ["kept.svg", "knowledge.svg", "losses.svg"]
    assert list(out(whole).parent.iterdir()) == [out(whole)]
    assert AutoTokenizer.from_pretrained(out(whole))("abc")["input_ids"] == tokenizer()("abc")["input_ids"]
    assert sir.Plan.load(out(whole) / "plan.json").to_json() == whole.plan.to_json()
    assert [g.group for g in Knowledge.load(out(whole) / "knowledge.json").groups] == ["kv0", "ffn0", "kv1", "ffn1"]


def test_stock_transformers_load_the_model_with_the_losses_of_the_report(whole: Outcome, data: Path) -> None:
    assert whole.saved.stock
    sources = prepare(load_data(data), tokenizer())
    for model in (AutoModelForCausalLM.from_pretrained(out(whole)), sir.load(out(whole))):
        found = evaluate_sources(model, sources)
        reported = whole.report["losses"]["tuning"]
        assert {n: loss.nll for n, loss in found.items()} == pytest.approx(
            {n: v["nll"] for n, v in reported.items()}, rel=1e-6
        )
    dense = evaluate_sources(build("llama_gqa"), sources)
    assert {n: loss.nll for n, loss in dense.items()} == {
        n: v["nll"] for n, v in whole.report["losses"]["dense"].items()
    }


def test_the_report_says_what_every_stage_did(whole: Outcome) -> None:
    made = report(out(whole))
    assert told(made) == told(json.loads(json.dumps(whole.report)))
    assert (made["command"], made["stock"], made["choice"]["ratio"]) == ("the command", True, RATIO)
    assert list(made["losses"]) == ["dense", "pruned", "reading", "tuning"]
    assert made["losses"]["tuning"]["texts"]["nll"] < made["losses"]["pruned"]["texts"]["nll"]
    assert [(s["stage"], len(s["rounds"]), list(s["baseline"])) for s in made["stages"]] == [
        ("reading", 2, ["texts", "asked"]), ("tuning", 1, ["asked"]),
    ]  # fmt: skip
    assert made["stages"][1]["losses"]["asked"] == pytest.approx(made["losses"]["tuning"]["asked"]["nll"], rel=1e-6)
    assert made["pruning"]["steps"] == 5
    before, after = (made["costs"][which]["parameters"] for which in ("dense", "sheared"))
    assert (before, after) == (build("llama_gqa").num_parameters(), sir.load(out(whole)).num_parameters())
    assert {g["group"]: g["units"] - g["kept"] for g in made["groups"]} == {
        c.group: c.size - len(c.kept) for c in whole.plan.cuts
    }
    assert all(made["speed"][which][what] > 0 for which in ("dense", "sheared") for what in ("forward", "generate"))


def at(what: str, step: int) -> Callable[[str, int, int], None]:
    """Stops a run when it says that it is at ``step`` of ``what``."""

    def progress(said: str, done: int, total: int) -> None:
        if said.endswith(what) and done == step:
            raise Stopped

    return progress


# Where a run is stopped, one after the other: at a step that it tells, or in a call, the first few of which go well.
STOPS: list[tuple[Any, ...]] = [
    ("measuring knowledge", 3), ("pruning", 1), ("pruning", 3), (module, "compare_speed", 0), (module.pipeline, "save", 0),
    (module, "sample", 0), ("reading: round 1", 2), ("reading: round 2", 1), ("tuning: round 1", 2),
    (module.pipeline, "save", 0), (module, "write_report", 0), (publish.shutil, "move", 3),
]  # fmt: skip


def stop(place: Path, data: Path, monkeypatch: pytest.MonkeyPatch, where: Any, what: Any, after: int = 0) -> None:
    if isinstance(where, str):
        with pytest.raises(Stopped):
            run(place, data, progress=at(where, what))
        return
    real, calls = getattr(where, what), iter(range(99))

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise Stopped
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(where, what, breaking)
        with pytest.raises(Stopped):
            run(place, data)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_stage_ends_as_one_that_was_not(
    tmp_path: Path, data: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, seen = tmp_path / "out", []
    for each in STOPS:
        stop(place, data, monkeypatch, *each)
        assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
        torch.manual_seed(99)
    done = run(place, data, progress=lambda said, *_: seen.append(said))
    assert {said for said in seen if not said.startswith("reading")} == set()
    assert weights(done) == weights(whole)
    assert told(report(place)) == told(report(out(whole)))
    assert list(tmp_path.iterdir()) == [place]


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run that was stopped in the first round of recovery."""
    place = tmp_path_factory.mktemp("begun") / "out"
    with pytest.raises(Stopped):
        run(place, data, progress=at("reading: round 1", 1))
    return place.with_name("out.work")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratio": 0.4}, "begun with other options"),
        ({"recipe": replace(RECIPE, pruning=replace(RECIPE.pruning, lr=1e-3))}, "begun with other options"),
        ({"recipe": freezing(0.5)}, "begun with other options"),
        ({"recipe": replace(RECIPE, recovery=replace(RECIPE.recovery, lr=1e-3))}, "begun with other settings"),
        ({"round_to": 4}, "begun with other options"),
        ({"data": {"rows": 41}}, "begun with other data"),
        ({"data": {"stages": [{"name": "reading", "sources": ["asked"]}, {"name": "tuning", "sources": ["asked"]}]}},
         "begun with other data"),
        ({"seed": 1}, r"begun with other weights \(of another model\)"),
    ],
)  # fmt: skip
def test_the_work_of_another_run_is_refused(
    tmp_path: Path, data: Path, begun: Path, change: dict[str, Any], said: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(begun, work)
    options = dict(change)
    options["model"] = build("llama_gqa", options.pop("seed", 0))
    given = write_data(tmp_path / "data", **options.pop("data")) if "data" in options else data
    with pytest.raises(PlanError, match=said) as refused:
        run(tmp_path / "out", given, work=work, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": 0.95}, "cannot be reached|can go"),
        ({"only": ("*.nothing.*",)}, "nothing"),
        ({"kinds": ("luck",)}, "luck"),
        ({"recipe": replace(RECIPE, stages={"turning": {}})},
         "the recipe has a stage turning; the stages of the data are reading, tuning"),
        ({"recipe": replace(RECIPE, recovery=replace(RECIPE.recovery, micro_batch=3))},
         "a batch of 4 rows cannot be split into steps of 3 rows on 1 process"),
        ({"recipe": replace(RECIPE, pruning=replace(RECIPE.pruning, micro_batch=3))},
         "a batch of 4 rows cannot be split into steps of 3 rows on 1 process"),
        ({"recipe": replace(RECIPE, pruning=replace(RECIPE.pruning, rank=10**9))},
         r"^pruning\.rank is 1000000000, and no projection of the model has more than 32: give a lower rank$"),
        ({"recipe": replace(RECIPE, stages={"tuning": {"rank": 33}})},
         "^the rank of the stage tuning is 33, and no projection of the model has more than 32"),
        ({"recipe": freezing(1.0)},
         r"^knowledge\.freeze 1 leaves 4 groups whole, and then the largest ratio that can be reached is 0, since every "
         r"group that could lose units is frozen: lower knowledge\.freeze \(0 is --stock\), or the ratio$"),
    ],
)  # fmt: skip
def test_what_no_stage_can_do_is_refused_before_the_first(
    tmp_path: Path, data: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        run(tmp_path / "out", data, **change)
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_that_the_groups_left_cannot_reach_is_refused_before_training(tmp_path: Path, data: Path) -> None:
    said = (
        r"^knowledge\.freeze 0\.75 leaves 3 groups whole, and then a ratio of 0\.3 cannot be reached: .* at most "
        r"0\.\d+ of the parameters can go: lower knowledge\.freeze \(0 is --stock\), or the ratio$"
    )
    with pytest.raises(PlanError, match=said):
        run(tmp_path / "out", data, recipe=freezing(0.75))
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == [
        "knowledge.json", "losses-dense.json", "run.json"
    ]  # fmt: skip


@pytest.mark.parametrize("work", ["out", "out/work", ".", "mine"])
def test_a_folder_that_must_not_be_removed_is_no_work(tmp_path: Path, data: Path, work: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    with pytest.raises(PlanError, match=r"keep them apart|holds files of something else"):
        run(tmp_path / "out", data, work=tmp_path / work)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "kept"]


def test_a_folder_that_is_there_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SaveError, match="exists already"):
        run(tmp_path / "out", tmp_path / "none.yaml")


def test_the_most_sensitive_groups_stay_whole(tmp_path: Path, data: Path) -> None:
    one_stage = write_data(tmp_path / "data", stages=None)
    quick = replace(freezing(0.25), recovery=replace(RECIPE.recovery, max_rounds=1), stages={})
    made = run(tmp_path / "out", one_stage, recipe=quick, ratio=0.1, keep_work=True)
    frozen = Knowledge.load(tmp_path / "out" / "knowledge.json").frozen
    assert len(frozen) == 1
    assert {g["group"] for g in made.report["groups"] if g["frozen"]} == set(frozen)
    assert all(g["kept"] == g["units"] for g in made.report["groups"] if g["frozen"])
    assert list(made.report["losses"]) == ["dense", "pruned", "recovery"]
    assert sir.load(tmp_path / "out").num_parameters() == made.report["costs"]["sheared"]["parameters"]  # type: ignore[operator]
    assert (tmp_path / "out.work" / "run.json").is_file()


def test_a_model_with_adapters_is_pruned_with_its_own(tmp_path: Path, data: Path) -> None:
    made = run(tmp_path / "out", data, model=adapted(targets=("q_proj", "v_proj"), lora_dropout=0.1), ratio=0.2)
    assert made.saved.stock
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def mending(**criteria: float) -> Recipe:
    """By scores that are measured before the training, and with repair."""
    pruning = replace(RECIPE.pruning, criteria=criteria, repair="least-squares", calibration=12, lr=1e-6)
    return replace(RECIPE, pruning=pruning, recovery=replace(RECIPE.recovery, max_rounds=1), stages={})


def test_units_are_chosen_by_measured_scores_and_what_is_repaired_goes_on_when_it_is_better(
    tmp_path: Path, data: Path
) -> None:
    made = run(tmp_path / "out", data, recipe=mending(flap=1.0), keep_work=True)
    told = made.report["pruning"]["repair"]
    assert told["taken"] == min(("trained", "repaired"), key=told.__getitem__)
    assert f"the {told['taken']} ones go on as `pruned`" in (tmp_path / "out" / "report.md").read_text()
    # Nearly without training the units are those that FLAP leaves, and least squares is by its own pass the same.
    model = build("llama_gqa")
    rows = {name: s.train for name, s in prepare(load_data(data), tokenizer()).items()}
    batches = batches_of(rows, 12, seed=0)
    plan = sir.plan(sir.trace(model), ratio=RATIO, importance="flap", data=batches)
    assert {c.group: c.kept.tolist() for c in plan.cuts} == {c.group: c.kept.tolist() for c in made.plan.cuts}
    alone = sir.shear(sir.repair(model, plan, data=batches), plan)
    judged = [evaluate(alone, each.spread(RECIPE.knowledge.rows)).nll for each in rows.values()]
    assert sum(judged) / len(judged) == pytest.approx(told["repaired"], rel=1e-4)
    assert told["taken"] == "repaired"
    measured = evaluate_sources(alone, prepare(load_data(data), tokenizer()))
    expected = {name: pytest.approx(loss.nll, rel=1e-4) for name, loss in measured.items()}
    assert {name: loss["nll"] for name, loss in made.report["losses"]["pruned"].items()} == expected


def test_adapters_of_the_user_are_merged_before_what_they_adapt_is_repaired(tmp_path: Path, data: Path) -> None:
    model = adapted(targets=("q_proj", "v_proj"), init_lora_weights=False)
    made = run(tmp_path / "out", data, model=model, recipe=mending(taylor=1.0, cosine=1.0))
    assert made.saved.stock
    assert {*made.report["pruning"]["repair"]} == {"name", "trained", "repaired", "taken"}


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["up_proj"]}])
def test_the_ratio_is_that_of_what_is_left_without_adapters(
    tmp_path: Path, data: Path, options: dict[str, Any]
) -> None:
    model = adapted(targets=("q_proj", "v_proj"), **options)
    made = run(tmp_path / "out", data, model=model, recipe=one_round(), ratio=0.3)
    base = build("llama_gqa")
    alone = sir.plan(sir.trace(base), ratio=0.3, importance="magnitude")
    assert made.report["ratio"] == alone.ratio


def one_round() -> Recipe:
    return replace(RECIPE, recovery=replace(RECIPE.recovery, max_rounds=1), stages={})


def test_what_was_sheared_before_is_sheared_once_more(tmp_path: Path, data: Path) -> None:
    model = build("llama_gqa")
    first = sir.shear(model, sir.plan(sir.trace(model), ratio=0.1, importance="magnitude", only=["*.layers.0.*"]))
    sir.save(first, tmp_path / "first")
    small = sir.load(tmp_path / "first")
    made = run(tmp_path / "out", data, model=small, recipe=one_round(), ratio=0.2)
    assert made.report["ratio"] == pytest.approx(0.2, abs=0.01)
    assert made.report["costs"]["dense"]["parameters"] == small.num_parameters()  # type: ignore[operator]
    assert sir.load(tmp_path / "out").num_parameters() == made.report["costs"]["sheared"]["parameters"]  # type: ignore[operator]


def test_a_criterion_that_cannot_score_is_refused_before_knowledge_is_measured(tmp_path: Path, data: Path) -> None:
    with pytest.raises(PlanError, match="reap"):
        run(tmp_path / "out", data, recipe=mending(reap=1.0))
    assert not (tmp_path / "out.work" / "knowledge.json").exists()


def test_adapters_that_are_switched_off_are_refused_first(tmp_path: Path, data: Path) -> None:
    model = adapted(targets=("q_proj",))
    model.disable_adapter_layers()
    with pytest.raises(PlanError, match="the adapters of the model are switched off"):
        run(tmp_path / "out", data, model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_model_writes_no_further_than_it_has_positions(tmp_path: Path) -> None:
    model = build("gpt2")
    model.config.max_position_embeddings = model.transformer.wpe.num_embeddings  # type: ignore[union-attr]
    room = model.transformer.wpe.num_embeddings  # type: ignore[union-attr]
    ids = torch.zeros(2, room - 1, dtype=torch.long)
    (speed,) = measure.compare_speed([model], ids, new_tokens=room)
    assert speed.forward > 0
    assert len(measure.sample(model, tokenizer(), [5] * (room - 2), new_tokens=30).split()) <= 2
