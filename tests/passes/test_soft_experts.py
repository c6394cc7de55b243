"""Experts that are all run and weighed by a softmax: a removed one has no weight, and the others share it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.rewrite.cuts import build_plan
from tests.oracle.locality import assert_local


class Weighed(nn.Module):
    """Every expert for every token; ``over_tokens``: what a token gives is shared out by a softmax as well."""

    def __init__(self, written: str, over_tokens: bool = False) -> None:
        super().__init__()
        self.written, self.over_tokens = written, over_tokens
        self.stem, self.router = nn.Linear(6, 10), nn.Linear(10, 5)
        self.up, self.shift = nn.Parameter(torch.randn(5, 10, 12)), nn.Parameter(torch.randn(5, 12))
        self.down, self.head = nn.Parameter(torch.randn(5, 12, 9)), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores = self.router(x)
        weights = scores.softmax(-1)
        if self.over_tokens:
            weights = weights * scores.softmax(1)
        h = (torch.einsum("btd,edf->btef", x, self.up) + self.shift).relu()
        if self.written == "one product":
            y = torch.einsum("btef,efo,bte->bto", h, self.down, weights)
        else:
            y = (torch.einsum("btef,efo->bteo", h, self.down) * weights.unsqueeze(-1)).sum(2)
        out: Tensor = self.head(y)
        return out


@pytest.mark.parametrize("written", ["one product", "a sum"])
@pytest.mark.parametrize("backend", ["module", "graph"])
def test_weighed_experts_can_go(written: str, backend: str) -> None:
    torch.manual_seed(0)
    model, x = Weighed(written).eval(), torch.randn(2, 7, 6)
    program = sir.trace(model, x)
    group = next(g for g in sir.groups(program) if g.kind == "expert")
    assert (group.size, group.prunable, group.least) == (5, True, 1)
    plan = build_plan(sir.groups(program), sir.analyses(program).get(MeasureCosts()), {group: np.array([0, 2])})
    assert plan.routers == {"router.weight": 0, "router.bias": 0}
    small = sir.shear(model, plan, backend=backend, inputs=x)  # type: ignore[arg-type]  # a Literal
    sir.verify(model, small, plan, x).raise_if_unsound()
    # The right value, by hand: weights of the two that stay, which sum up to one.
    h = model.stem(x)
    weights = model.router(h)[..., [0, 2]].softmax(-1)
    each = [(h @ model.up[e] + model.shift[e]).relu() @ model.down[e] for e in (0, 2)]
    expected = model.head(sum(weights[..., [i]] * y for i, y in enumerate(each)))
    found = small(x)
    torch.testing.assert_close(found if isinstance(found, Tensor) else found[0], expected)


def test_no_kept_entry_hangs_on_a_removed_expert() -> None:
    assert_local(Weighed("a sum").eval(), torch.randn(2, 7, 6))


def test_scores_that_are_compared_along_tokens_hold_their_experts() -> None:
    groups = sir.groups(sir.trace(Weighed("a sum", over_tokens=True).eval(), torch.randn(2, 7, 6)))
    reasons = [g.reason for g in groups if g.kind == "expert"]
    assert reasons == ["removed entries would have no softmax at %softmax_int_1 = aten.softmax.int"]


class Softened(nn.Module):
    """A softmax over channels of an MLP is no choice among experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).softmax(-1))
        return out


def test_channels_that_a_softmax_runs_over_are_held() -> None:
    groups = sir.groups(sir.trace(Softened().eval(), torch.randn(2, 7, 6)))
    assert [g.reason for g in groups if g.size == 11] == [
        "softmax runs over the axis at %softmax_int = aten.softmax.int"
    ]
