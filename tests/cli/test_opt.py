"""opt: passes spelled as text do what they do in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shear_ir as sir
from shear_backends.graph.module import named_tensors
from shear_ir.manager import PassManager
from shear_passes.analysis.dump import Dump
from shear_passes.rewrite import DeadCode, Shear
from shear_passes.select import SelectUniform
from tests.cli import factories
from tests.cli.conftest import Shear as Command

MLP = "tests.cli.factories:mlp"
PASSES = "select-uniform{ratio=0.25},shear,dead-code"


def test_opt_ends_with_the_program_that_python_makes(shear: Command) -> None:
    model = factories.mlp()
    passes = [SelectUniform(ratio=0.25), Shear(), DeadCode()]
    result = PassManager(passes).run(sir.trace(model), named_tensors(model))
    assert shear("opt", MLP, "-p", PASSES).out == result.analyses.get(Dump()) + "\n"


def test_the_program_is_printed_between_passes(shear: Command) -> None:
    out = shear("opt", MLP, "-p", PASSES, "--print-between-passes").out
    heads = [line for line in out.splitlines() if line.startswith("#")]
    assert heads == ["# start", "# after select-uniform{ratio=0.25}", "# after shear", "# after dead-code"]
    assert out.count("@gate.weight : f32[ffn:20, ") == 1
    assert out.count("@gate.weight : f32[ffn:15, ") == 2


def test_passes_are_timed(shear: Command, tmp_path: Path) -> None:
    ran = shear("opt", MLP, "-p", PASSES, "--time-passes", "-o", tmp_path / "last.txt")
    rows = [line.split() for line in ran.out.splitlines() if line.strip()]
    assert [row[0] for row in rows[3:]] == ["select-uniform{ratio=0.25}", "shear", "dead-code", "total"]
    assert "@gate.weight : f32[ffn:15, " in (tmp_path / "last.txt").read_text()


def test_each_pass_is_compared_with_the_masked_original(shear: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = "select-uniform{ratio=0.25},shear,select-uniform{ratio=0.3 importance=random{seed=1}},shear"
    steps = shear("opt", MLP, "-p", twice, "--verify-each", "--json").json["steps"]
    sizes = [step["parameters"] for step in steps]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert all(step.get("max_abs_diff", 0.0) < 1e-5 for step in steps)
    assert [("max_abs_diff" in step) for step in steps] == [False, True, False, True]

    def wrong(self: Shear, weights: dict[str, torch.Tensor], analyses: object) -> dict[str, torch.Tensor]:
        return {n: 2 * t for n, t in Shear_carry(self, weights, analyses).items()}

    Shear_carry = Shear.carry
    monkeypatch.setattr(Shear, "carry", wrong)
    ran = shear("opt", MLP, "-p", PASSES, "--verify-each")
    assert ran.sentence.startswith("after shear the program's outputs differ from the masked original's by ")


def test_a_config_alone_is_checked_without_its_outputs(shear: Command, config_only: Path) -> None:
    passes = "select-uniform{ratio=0.2 importance=order},shear"
    steps = shear("opt", config_only, "-p", passes, "--verify-each", "--json").json["steps"]
    assert [("max_abs_diff" in step) for step in steps] == [False, False]


def test_a_pass_is_drawn_after(shear: Command, tmp_path: Path) -> None:
    ran = shear("opt", MLP, "-p", PASSES, "--draw-after", "shear", "-o", tmp_path / "a.dot")
    assert "\n@gate.weight : f32[ffn:15, " in ran.out
    assert (tmp_path / "a.dot").read_text().startswith("digraph")
    refused = shear("opt", MLP, "-p", PASSES, "--draw-after", "dump").sentence
    assert refused == "--draw-after names dump, which is not among the passes select-uniform, shear, dead-code"


def test_a_plan_file_is_applied(shear: Command, tmp_path: Path) -> None:
    shear("prune", MLP, "--ratio", "0.25", "--dry-run", "--plan-out", tmp_path / "plan.json")
    ran = shear("opt", MLP, "-p", f"shear{{plan={tmp_path / 'plan.json'}}}", "--verify-each", "--json")
    assert "ffn:15" in ran.json["text"]


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ("sher", "there is no pass 'sher'; did you mean shear?"),
        ("select-uniform{ratoi=0.2}", "select-uniform has no option 'ratoi'; did you mean ratio?"),
        ("select-uniform{ratio=x}", "select-uniform takes ratio=NUMBER, not ratio=x"),
        ("shear", "shear needs a plan: put a selection before it, or give it plan=FILE"),
        ("select-uniform{ratio=2}", "ratio is a share of the parameters between 0 and 1, not 2.0"),
    ],
)
def test_a_wrong_pipeline_is_one_sentence(shear: Command, passes: str, said: str) -> None:
    assert shear("opt", MLP, "-p", passes).sentence == said


def test_adapters_are_raised_where_they_are_asked_to_be(shear: Shear) -> None:
    adapted = "tests.cli.factories:adapted"
    ran = shear("opt", adapted, "-p", "raise-lora,select-uniform{ratio=0.2},shear", "--verify-each", "--json").json
    assert [step["operators"] for step in ran["steps"]] == [5, 5, 5]
    assert ran["steps"][2]["max_abs_diff"] <= 1e-5
    assert "lora.linear" not in shear("opt", adapted, "-p", "dead-code").out
