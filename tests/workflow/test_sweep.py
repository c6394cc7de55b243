"""Sweep: every combination measured as it would be alone, kept, and gone on with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_tools.workflow.calibration import calibration_batches
from shear_tools.workflow.plots import plot_sweep
from shear_tools.workflow.sweep import Trial, ranked, sweep, trials
from shear_tools.workflow.work import alone
from shear_training.data import held_out, load_data
from shear_training.evaluate import evaluate
from shear_training.knowledge import Knowledge
from tests.workflow.tiny import tokenizer, write_data, write_model
from tests.zoo import build

WANTED = trials([0.3, 0.97], ["wanda"], ["uniform", "global"], ["none", "least-squares"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_model(folder / "dense")
    write_data(folder)
    return folder


def swept(place: Path, keep: Path | None = None, **options: Any) -> Any:
    batches, _ = calibration_batches(place / "data.yaml", tokenizer(), samples=6)
    sources = held_out(load_data(place / "data.yaml", whole=True), tokenizer())
    return sweep(build("llama_gqa"), WANTED, batches, sources, keep=keep, **options), batches, sources


def test_a_point_is_what_plan_repair_and_shear_give_alone(place: Path, tmp_path: Path) -> None:
    made, batches, sources = swept(place)
    model = build("llama_gqa")
    plan = sir.plan(sir.trace(model), ratio=0.3, importance="wanda", allocation="global", data=batches)
    small = sir.shear(sir.repair(model, plan, data=batches), plan)
    point = next(p for p in made.points if p.trial == Trial(0.3, "wanda", "global", "least-squares"))
    assert point.losses == {name: evaluate(small, rows) for name, rows in sources.items()}
    assert (point.costs, made.dense.costs) == (plan.after, plan.before)
    too_much = [p for p in made.points if p.trial.ratio == 0.97]
    assert all("a ratio of 0.97 cannot be reached" in p.why and math.isnan(p.nll) for p in too_much)
    assert [p.trial.ratio for p in ranked(made).points] == [0.3] * 4 + [0.97] * 4
    plot_sweep(made, tmp_path / "sweep.svg")
    assert "wanda + global + least-squares" in (tmp_path / "sweep.svg").read_text()


def test_what_is_measured_is_not_measured_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = tmp_path / "sweep.json"
    first, swept_on, _ = swept(place, keep)
    whole = json.loads(keep.read_text())
    keep.write_text(json.dumps({**whole, "points": whole["points"][:-1]}))

    def measure(*_: Any, **__: Any) -> Any:
        raise AssertionError("what is left cannot be sheared, so nothing is to be measured")

    with alone(keep), pytest.raises(PlanError, match=r"another run is working in .*sweep\.json"):
        swept(place, keep)
    monkeypatch.setattr("shear_tools.workflow.sweep.evaluate_sources", measure)
    again, *_ = swept(place, keep)
    assert (again.dense, again.points) == (first.dense, first.points)
    with pytest.raises(PlanError, match="holds a sweep of another model, data or options"):
        swept(place, keep, seed=3)
    batches, _ = calibration_batches(place / "data.yaml", tokenizer(), samples=5)
    sources = held_out(load_data(place / "data.yaml", whole=True), tokenizer())
    for model, rows in ((build("llama_gqa"), batches), (build("llama_gqa", seed=1), swept_on)):
        with pytest.raises(PlanError, match="holds a sweep of another model, data or options"):
            sweep(model, WANTED, rows, sources, keep=keep)
    keep.write_text("{}")
    with pytest.raises(PlanError, match=r"sweep\.json cannot be read: remove it to begin anew"):
        swept(place, keep)


def test_knowledge_of_another_model_is_refused(place: Path) -> None:
    other = Knowledge("0123456789abcdef", 3.0, (0.5,), 0.0, ())
    with pytest.raises(PlanError, match="the knowledge was measured on another model: its digest is 0123456789abcdef"):
        swept(place, knowledge=other)
