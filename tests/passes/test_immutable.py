"""What an analysis returned stays as it was, whatever is asked for later."""

from __future__ import annotations

from itertools import permutations

import pytest

import shear_ir as sir
from shear_ir.axes import Axis, atoms
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.residual_blocks import FindBlocks
from shear_passes.analysis.vanish import FindZeros
from tests.zoo import build

LATER: list[Analysis[object]] = [FindZeros(), FindBlocks(), FindGroups()]


@pytest.fixture(scope="module", params=["llama_gqa", "mixtral", "qwen3"])
def program(request: pytest.FixtureRequest) -> Program:
    return sir.trace(build(request.param))


def frozen(axes: Axes) -> dict[Axis, object]:
    """Why each atom of a parameter is frozen, as the axes say."""
    return {a: a.freeze for dims in axes.of_param.values() for dim in dims for a in atoms(dim)}


def test_later_analyses_freeze_nothing_in_the_axes(program: Program) -> None:
    manager = AnalysisManager(program)
    axes = manager.get(InferAxes())
    before = frozen(axes)
    groups = manager.get(FindGroups())
    assert frozen(axes) == before
    # The test can fail: analyses after inference do hold axes.
    assert any(group.freeze != group.axis.freeze for group in groups.of_axes)


def test_the_order_of_questions_changes_no_answer(program: Program) -> None:
    said = set()
    for order in permutations(LATER):
        manager = AnalysisManager(program)
        for analysis in order:
            manager.get(analysis)
        said.add("\n".join(map(str, manager.get(FindGroups()))))
    assert len(said) == 1
