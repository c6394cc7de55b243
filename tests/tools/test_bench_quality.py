"""The bench of quality: its arithmetic, its budgets and its table; the runs themselves take half an hour."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import quality
from tests.golden import expect_file

WORSE = {"magnitude": 2.0, "magnitude + LoRA": 0.6, "repaired": 0.4, "repaired + LoRA": 0.1, "bundled": 0.2,
         "default": 0.5, "dense + LoRA": -0.05}  # fmt: skip
"""How the variants differ from the dense model, in nats per token."""


def losses(above: float) -> dict[str, float]:
    """Of a dense model ln 8, ln 4, ln 2, and so much more."""
    return {"code": math.log(8) + above, "docs": math.log(4) + above, "topics": math.log(2) + above,
            "instructions": 1000.0}  # fmt: skip


def runs(seeds: int, ratio: float = 0.2) -> list[dict[str, Any]]:
    """What the seeds would have measured, each 0.01 nats above the one before; 0.003 is the better of two rates."""
    made = []
    for seed in range(seeds):
        tried: dict[str, dict[str, Any]] = {}
        for name, above in WORSE.items():
            tried[name] = {}
            for rate in ("0.001", "0.003") if name in quality.RATES else ("",):
                more = above + 0.01 * seed + (0.25 if rate == "0.001" else 0.0)
                tried[name][rate] = {"losses": losses(more), "seconds": 30.0}
                if name in quality.RATES:
                    tried[name][rate]["tokens"] = 40_000
        for name in ("bundled", "default"):
            for each in tried[name].values():
                each |= {"pruned": losses(0.45), "lhspg": 20_000, "as flap": [10, 12],
                         "repair": {"taken": "trained" if seed else "repaired"}}  # fmt: skip
        lora = tried.pop("dense + LoRA")
        made.append({"ratio": 0.0, "seed": seed, "tried": {"dense": {"": {"losses": losses(0.0), "seconds": 30.0}},
                                                           "dense + LoRA": lora}})  # fmt: skip
        made.append({"ratio": ratio, "seed": seed, "tried": tried})
    return made


def row(made: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    (found,) = [r for r in quality.summary(made) if r["variant"] == variant]
    return found


def test_a_domain_counts_once_and_the_instructions_not_at_all() -> None:
    assert quality.mean({"code": 1.0, "docs": 2.0, "topics": 6.0, "instructions": 1000.0}) == 3.0
    assert row(runs(1), "dense")["perplexity"] == pytest.approx({"code": 8.0, "docs": 4.0, "topics": 2.0})


def test_a_row_is_of_the_best_rate_over_the_seeds_and_against_the_dense_model() -> None:
    found = row(runs(3), "repaired + LoRA")
    growth = [math.exp(0.1 + 0.01 * seed) - 1 for seed in range(3)]
    assert (found["seeds"], found["rate"], found["tokens"]) == (3, "0.003", 40_000)
    assert found["growth"] == pytest.approx(sum(growth) / 3)
    assert found["spread"] == pytest.approx(math.sqrt(sum((g - sum(growth) / 3) ** 2 for g in growth) / 2))
    assert found["nll"] == pytest.approx(math.log(4) + 0.11)
    assert row(runs(1), "repaired + LoRA")["spread"] == 0.0
    assert row(runs(1), "dense + LoRA")["growth"] == pytest.approx(math.exp(-0.05) - 1)


def test_before_recovery_a_recipe_has_spent_the_tokens_of_lhspg_alone() -> None:
    found = row(runs(2), "bundled, pruned")
    assert (found["tokens"], found["growth"]) == (20_000, pytest.approx(math.exp(0.45) - 1))


def test_ratios_are_told_apart() -> None:
    both = [*runs(1, 0.5), *runs(1, 0.2)[1:]]
    rows = quality.summary(both)
    assert [(r["ratio"], r["variant"]) for r in rows] == [(x, name) for x in (0.2, 0.5) for name in quality.VARIANTS]


def test_what_was_not_measured_has_no_row_and_no_verdict() -> None:
    made = runs(2)
    for run in made:
        run["tried"].pop("default", None)
    made[3]["tried"].pop("repaired + LoRA")
    assert {r["variant"] for r in quality.summary(made)} == set(quality.VARIANTS) - {"default", "default, pruned"}
    said = quality.verdicts(made)
    assert not any("default" in sentence for sentence in said)
    assert any(sentence.endswith("lower in 0 of 1 seeds.") for sentence in said)


def test_what_is_kept_is_collected_by_rate(tmp_path: Path) -> None:
    (tmp_path / "0.5-1").mkdir()
    for name, above in (("repaired", 0.4), ("repaired + LoRA@0.001", 0.3), ("repaired + LoRA@0.009", 0.2)):
        quality._keep(tmp_path / "0.5-1" / f"{name}.json", lambda above=above: {"losses": losses(above)})
    (made,) = quality.collected(tmp_path, (0.2, 0.5), (0, 1))
    assert (made["ratio"], made["seed"], list(made["tried"])) == (0.5, 1, ["repaired", "repaired + LoRA"])
    assert list(made["tried"]["repaired + LoRA"]) == ["0.001", "0.009"]
    assert quality.best(made["tried"]["repaired + LoRA"]) == "0.009"
    assert json.loads((tmp_path / "0.5-1" / "repaired.json").read_text())["seconds"] >= 0.0


@pytest.mark.parametrize("tokens", [1, 40_000, 240_000])
def test_every_method_trains_on_as_many_tokens(tokens: int) -> None:
    given = quality.Given(0.5, 2, tokens, Path(), {})
    rows = max(24, round(tokens / 256))
    assert given.rows == rows
    for make, rate in ((quality.bundled, 6e-3), (quality.default, 4e-4)):
        recipe = make(given, rate)
        asked = recipe.pruning
        steps = asked.warmup + asked.periods * asked.steps
        stages = [recipe.stage(name) for name in ("pretraining", "instructions")]
        spent = asked.batch * steps + sum(stage.rows_per_round * stage.epochs for stage in stages)
        assert asked.seed == stages[0].seed == 2
        assert stages[0].lr == rate
        if tokens > 1:  # the bundled recipe's LHSPG alone is ten steps
            assert abs(spent - rows) <= 2
    assert quality.bundled(given, 6e-3).pruning.lr == pytest.approx(2e-3)  # a third, as in the file
    assert quality.bundled(given, 6e-3).stage("instructions").lr == pytest.approx(2.4e-3)
    assert quality.default(given, 4e-4).pruning.lr == pytest.approx(1.2e-3)


def test_the_table_for_people() -> None:
    options = {"parameters": 1943936, "versions": "torch 2.13", "machine": "x86_64, 2 cores", "tokens": 40_000,
               "command": "python tools/bench/quality.py"}  # fmt: skip
    expect_file(quality.markdown(runs(2), options), "quality.md")
