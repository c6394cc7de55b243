"""Recipes: every option can be given, everything else is refused in one sentence."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from shear_ir.errors import LoadError, PlanError
from shear_tools.workflow.recipe import KnowledgeOptions, Recipe, load_recipe
from shear_training.pruning import Pruning
from shear_training.settings import Recovery

ROOT = Path(__file__).resolve().parents[2]

OTHER: dict[str, dict[str, Any]] = {
    "knowledge": {"ratios": [0.3, 0.6], "freeze": 0.25, "rows": 7, "allocate": True},
    "pruning": {
        "rank": 3, "alpha": 5.0, "lr": 0.002, "schedule": "cosine", "lr_warmup": 0.1, "batch": 6, "micro_batch": 2,
        "warmup": 4, "periods": 3, "steps": 9, "eps": 0.5, "criteria": {"magnitude": 1.0}, "compete": True, "seed": 5,
        "calibration": 9, "repair": "least-squares",
        "bf16": True, "gradient_checkpointing": True, "torch_compile": True, "device": "cpu", "save_steps": 11,
    },
    "recovery": {
        "rank": 3, "alpha": 5.0, "dropout": 0.2, "lr": 0.002, "batch": 6, "micro_batch": 2, "rows_per_round": 9,
        "epochs": 3, "warmup": 0.1, "schedule": "cosine", "weight_decay": 0.01, "dynamic": False, "floor": 0.3,
        "max_rounds": 4, "token_budget": 999, "tolerance": 0.01, "patience": 3, "merge": False, "seed": 5, "bf16": True,
        "gradient_checkpointing": True, "torch_compile": True, "device": "cpu", "save_steps": 11, "eval_batch": 2,
    },
}  # fmt: skip
"""Every option of every section, with a value that is not its default."""


def written(folder: Path, document: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("section", "kind"), [("knowledge", KnowledgeOptions), ("pruning", Pruning), ("recovery", Recovery)]
)
def test_every_option_of_a_section_can_be_given(tmp_path: Path, section: str, kind: Any) -> None:
    assert set(OTHER[section]) == {f.name for f in fields(kind)}
    made = asdict(getattr(load_recipe(written(tmp_path, {section: OTHER[section]})), section))
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in made.items()} == OTHER[section]
    assert not any(made[name] == value for name, value in asdict(kind()).items())


def test_what_is_not_given_is_the_default(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "")) == Recipe()
    assert load_recipe(written(tmp_path, "pruning:\nstages:\n")) == Recipe()


def test_a_stage_differs_in_what_it_says_and_in_nothing_else(tmp_path: Path) -> None:
    # YAML takes 5e-4 for text: without a dot it is no number.
    made = load_recipe(written(tmp_path, "recovery: {lr: 2e-3, rank: 4}\nstages: {tuning: {lr: 5e-4, epochs: 3}}"))
    assert (made.recovery.lr, made.stage("reading")) == (0.002, made.recovery)
    tuning = made.stage("tuning")
    assert (tuning.lr, tuning.epochs, tuning.rank) == (0.0005, 3, 4)


def test_options_of_the_command_line_reach_every_stage() -> None:
    made = Recipe(stages={"tuning": {"epochs": 3}}).with_options(seed=7, device="cpu", bf16=None)
    assert (made.pruning.seed, made.recovery.seed, made.stage("tuning").seed) == (7, 7, 7)
    assert (made.pruning.device, made.pruning.bf16, made.stage("tuning").epochs) == ("cpu", False, 3)


def test_the_bundled_recipe_is_one() -> None:
    assert load_recipe(ROOT / "tools" / "assets" / "tiny-llama" / "recipe.yaml") != Recipe()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("pruning: [", "recipe.yaml is no YAML: while parsing"),
        ("- pruning", "recipe.yaml must be a mapping with sections such as pruning and recovery"),
        ("training: {}", "recipe.yaml has a section training; a recipe has knowledge, pruning, recovery, stages"),
        ("pruning: 3", "recipe.yaml: pruning must be a mapping of options"),
        ("stages: [tuning]", "recipe.yaml: stages must be a mapping of options"),
        ("stages: {tuning: 3}", "recipe.yaml: stages.tuning must be a mapping of options"),
        ("stages: {tuning: {speed: 3}}", "recipe.yaml: stages.tuning has no option speed; it has alpha, batch, bf16"),
        ("stages: {tuning: {lr: -1}}", "recipe.yaml: stages.tuning: lr of a recovery is a positive number, not -1.0"),
        ("pruning: {speed: 3}", "recipe.yaml: pruning has no option speed; it has alpha, batch, bf16"),
        ("pruning: {periods: many}", "recipe.yaml: pruning.periods: Input should be a valid integer"),
        ("pruning: {periods: 0}", "recipe.yaml: pruning: there is at least one period of one step, not 0 of 20"),
        ("pruning: {criteria: {luck: 1}}", "recipe.yaml: pruning: there is no saliency criterion 'luck'"),
        ("pruning: {criteria: {}}", "recipe.yaml: pruning: "),
        ("pruning: {criteria: {'flap{speed=1}': 1}}", "those of --importance, of which flap has no option .speed."),
        ("pruning: {repair: glue}", "recipe.yaml: pruning.repair: Input should be 'none' or 'least-squares'"),
        ("pruning: {calibration: 0}", "recipe.yaml: pruning: rows to calibrate on are a number from 1 up, not 0"),
        ("knowledge: {allocate: true}\npruning: {compete: true}", "recipe.yaml: layers share by what was measured"),
        ("knowledge: {freeze: 2}", "recipe.yaml: knowledge: the share of groups to freeze is between 0 and 1, not 2.0"),
        (
            "knowledge: {ratios: [1.5]}",
            "recipe.yaml: knowledge: a ratio is a share of a group between 0 and 1, not 1.5",
        ),
        ("knowledge: {ratios: []}", "recipe.yaml: knowledge: there is at least one ratio to measure at"),
        ("pruning: {seed: 1}\npruning: {seed: 2}", "recipe.yaml is no YAML: the key pruning occurs twice"),
        ("recovery: {device: abacus}", "recipe.yaml: recovery: a recovery runs on cpu or cuda, not on 'abacus'"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, document: str, said: str) -> None:
    with pytest.raises(LoadError, match=said) as refused:
        load_recipe(written(tmp_path, document))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"the recipe .*none\.yaml cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_a_repair_that_is_none_is_refused_from_python_too() -> None:
    with pytest.raises(PlanError, match="there is no repair 'glue'; there are none, least-squares"):
        Pruning(repair="glue")  # type: ignore[arg-type]


def test_shares_that_are_none_are_refused_from_python_too() -> None:
    with pytest.raises(PlanError, match="rows to measure on are a number from 1 up, not 0"):
        KnowledgeOptions(rows=0)
