"""Distances: both sides have to be zero where a feature is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from tests.golden import expect
from tests.ops.typed import typed


def test_distances_sum_over_features_that_both_sides_lose() -> None:
    expect(
        typed(lambda x, y: torch.cdist(x, y), x=(2, 5, 4), y=(2, 6, 4)),
        """
        x [a:2, b:5, c:4]
        y [a:2, d:6, c:4]
        -> [a:2, b:5, d:6]
        zero: a
        """,
    )


def test_a_side_that_is_not_zero_holds_the_axis() -> None:
    expect(
        typed(lambda x, y: torch.cdist(x, y.cos(), p=1.0), x=(5, 4), y=(6, 4)),
        """
        x [a:5, b!:4]
        y [c:6, b!:4]
        -> [a:5, c:6]
        b: summed over where removed entries need not be zero at %cdist_default = aten.cdist
        """,
    )


def test_an_epsilon_holds_the_axis_of_a_distance_by_pairs() -> None:
    expect(
        typed(lambda x, y: (F.pairwise_distance(x, y), F.pairwise_distance(x, y, eps=0.0)), x=(5, 4), y=(5, 4)),
        """
        x [a:5, b!:4]
        y [a:5, b!:4]
        -> [a:5]
        -> [a:5]
        zero: -, a
        b: an epsilon is added to every entry before it is summed up at %pairwise_distance_default = aten.pairwise_distance
        """,
    )


def test_a_cosine_misses_no_zeros() -> None:
    expect(
        typed(lambda x, y: F.cosine_similarity(x, y, dim=1), x=(5, 4, 3), y=(5, 4, 1)),
        """
        x [a:5, b:4, c:3]
        y [a:5, b:4, 1]
        -> [a:5, c:3]
        """,
    )


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.prototypes = nn.Linear(6, 20), nn.Linear(20, 9), nn.Parameter(torch.randn(4, 9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.down(self.up(x).relu()), self.prototypes)


@pytest.mark.parametrize("backend", ["module", "graph"])
def test_distances_to_prototypes_freeze_nothing(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Prototypes().eval(), torch.randn(2, 7, 6)
    program = sir.trace(model, x)
    assert {(g.kind, g.size) for g in sir.groups(program) if g.prunable} == {("ffn", 20), ("ffn", 9)}
    plan = sir.plan(program, ratio=0.3)
    small = sir.shear(model, plan, backend=backend, inputs=x)  # type: ignore[arg-type]  # a Literal
    assert {len(c.kept) < c.size for c in plan.cuts} == {True}
    sir.verify(model, small, plan, x).raise_if_unsound()
