"""The report: its arithmetic, and numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shear_tools.workflow.recipe import KnowledgeOptions, Recipe
from shear_tools.workflow.report import degradation, mean, write_report
from shear_training.evaluate import Loss
from shear_training.pruning import Pruning
from shear_training.settings import Recovery
from tests.workflow.drawn import KNOWLEDGE, PLAN

DENSE = {"code": Loss(2.0, 100), "prose": Loss(4.0, 7)}
PRUNED = {"code": Loss(2.6, 100), "prose": Loss(4.0, 7)}
LOST = {"code": Loss(math.nan, 100), "prose": Loss(900.0, 7)}


def document(**change: Any) -> dict[str, Any]:
    rounds = [
        {
            "number": 1,
            "weights": {"code": 0.9, "prose": 0.1},
            "after": {"code": 2.1, "prose": 4.1},
            "tokens": 1234,
            "seconds": 5.2,
        }
    ]
    stage = {
        "stage": "reading",
        "baseline": {"code": 2.6, "prose": 4.0},
        "rounds": rounds,
        "best": 0,
        "stopped": "max rounds",
    }
    recipe = Recipe(
        KnowledgeOptions(allocate=True), Pruning(seed=1, criteria={"flap": 2.0, "cosine": 0.5}), Recovery(seed=2)
    )
    return {
        "command": "shear-ir lorashear x", "choice": {"ratio": 0.2}, "recipe": recipe.to_json(), "data": {"seed": 3}, "plan": PLAN,
        "knowledge": KNOWLEDGE, "stock": False, "note": "uneven layers",
        "pruning": {"steps": 5, "tokens": 4321, "speed": {"dense": {"forward": 10.0, "generate": 0.0}, "sheared": {"forward": 12.5, "generate": 0.0}}},
        "losses": {"dense": DENSE, "pruned": PRUNED}, "samples": {"dense": "a ``` b"}, "stages": [stage], **change,
    }  # fmt: skip


def test_degradation_is_the_growth_of_the_mean_loss_each_source_counting_the_same() -> None:
    assert (mean(DENSE), mean(PRUNED)) == pytest.approx((3.0, 3.3))
    assert degradation(PRUNED, DENSE) == pytest.approx(0.1)
    assert degradation(DENSE, DENSE) == 0.0


def test_the_text_says_what_the_numbers_say(tmp_path: Path) -> None:
    made = write_report(document(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert made["degradation"] == {"dense": 0.0, "pruned": pytest.approx(0.1)}
    assert "| pruned | 2.600 (13.5) | 4.000 (54.6) | 3.300 | +10.0 % |" in text
    assert "+10.0 % against the dense model's 3.000." in text
    assert "| tokens per second, forward | 10 | 12 | 125.0 % |" in text
    assert "| tokens per second, generate | 0 | 0 | – |" in text
    assert "reading: 1 round, none made it better; stopped: max rounds." in text
    assert "| 1 | 0.90 | 0.10 | 2.100 | 4.100 | 1,234 | 5 |" in text
    assert "`shear_ir.load` loads it (uneven layers)" in text
    assert 'Seeds: {"pruning": 1, "recovery": 2, "data": 3}. Pruning took 5 steps on 4,321 tokens.' in text
    said = "Layers lose what costs least by the knowledge distribution; units go by flap (2), cosine (0.5), on 128 training"
    assert said in text
    assert "a ''' b" in text
    assert text.count("```") % 2 == 0
    kept = {g["group"]: g["kept"] for g in made["groups"]}
    assert kept == {
        g.group: next((len(c.kept) for c in PLAN.cuts if c.group == g.group), g.size) for g in KNOWLEDGE.groups
    }
    assert all(f"| {name} | `" in text for name in kept)


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    write_report(document(losses={"dense": DENSE, "pruned": LOST}), tmp_path)

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["losses"]["pruned"]["code"] == {"nll": None, "tokens": 100, "perplexity": None}
    assert read["losses"]["pruned"]["prose"] == {"nll": 900.0, "tokens": 7, "perplexity": None}
    assert (read["degradation"]["dense"], read["degradation"]["pruned"]) == (0.0, None)
    lost = next(g for g in KNOWLEDGE.groups if not math.isfinite(g.mean)).group
    assert [g["deviation"] for g in read["groups"] if g["group"] == lost] == [None]
    assert "| pruned | nan (nan) | 900.000 (inf) | nan | +nan % |" in (tmp_path / "report.md").read_text()
