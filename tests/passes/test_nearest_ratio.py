"""What goes is as near to what was asked for as whole units can come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.plans import Plan


class Convolutions(nn.Module):
    def __init__(self, widths: tuple[int, int, int], groups: int) -> None:
        super().__init__()
        first, second, third = widths
        self.first = nn.Conv2d(3, first, 3, padding=1)
        self.second = nn.Conv2d(first, second, 3, padding=1, groups=groups)
        self.third = nn.Conv2d(second, third, 3, padding=1, groups=groups)
        self.head = nn.Linear(third, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.first(x).relu()).relu()).relu().mean((2, 3)))
        return out


def planned(widths: tuple[int, int, int], groups: int, ratio: float) -> Plan:
    torch.manual_seed(0)
    program = sir.trace(Convolutions(widths, groups).eval(), torch.randn(2, 3, 8, 9))
    kinds = {g.kind for g in sir.groups(program) if g.prunable}
    return sir.plan(program, ratio=ratio, kinds=sorted(kinds))


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3, 0.5])
def test_channels_of_unlike_cost_are_traded_until_the_ratio_is_met(ratio: float) -> None:
    plan = planned((13, 22, 31), 1, ratio)
    assert abs(plan.ratio - ratio) <= 0.005
    assert plan.notes == ()


def test_equal_convolutions_part_where_a_unit_of_each_is_too_much() -> None:
    # A unit of each of the three is 0.37 of the parameters; two of one are what was asked for.
    assert planned((4, 4, 4), 1, 0.3).ratio == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize(("ratio", "given"), [(0.1, 0.125), (0.3, 0.3206)])
def test_groups_of_channels_are_traded_too(ratio: float, given: float) -> None:
    assert planned((16, 24, 32), 8, ratio).ratio == pytest.approx(given, abs=5e-4)


class Mlps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(6, 20) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(20, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = down(up(x).relu()).tanh()
        return x


def test_equal_layers_stay_equal_however_near_unlike_ones_would_come() -> None:
    plan = sir.plan(
        sir.trace(Mlps().eval(), torch.randn(2, 7, 6)), ratio=0.08, kinds=("ffn",), only=("ups.*", "downs.*")
    )
    counts = {c.group: len(c.kept) for c in plan.cuts if c.size == 20}
    assert len(counts) == 3
    assert len(set(counts.values())) == 1
