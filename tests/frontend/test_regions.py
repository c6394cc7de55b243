"""What the copy of an exported graph lays open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from tests.roads import trace


class Pick(nn.Module):
    """Picks entries of a dim by a list of numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.numbers]


@pytest.mark.parametrize("numbers", [[-2], [-1], [-3, -2, -1], [0], [1, 2]])
def test_entries_picked_by_consecutive_numbers_are_a_slice(numbers: list[int]) -> None:
    x = torch.randn(3, 5)
    program = sir.trace(Pick(numbers), {"x": x})
    (call,) = [n for n in program.calls() if n.name.startswith(("slice", "index"))]
    assert call.target is torch.ops.aten.slice.Tensor
    assert torch.equal(call.target(x, *call.args[1:]), x[:, numbers])


@pytest.mark.parametrize("numbers", [[0, 2], [2, 1], [-1, 0], [1, 1]])
def test_other_numbers_stay_an_index(numbers: list[int]) -> None:
    program = sir.trace(Pick(numbers), {"x": torch.randn(3, 5)})
    assert any(n.target is torch.ops.aten.index.Tensor for n in program.calls())


class Turned(nn.Module):
    """Reads some channels as they are and others as complex numbers, all of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 14)
        self.outer = nn.Linear(14, 7)

    def forward(self, x: Tensor) -> Tensor:
        plain, pairs = self.inner(x).split([6, 8], dim=-1)
        turned = torch.view_as_real(torch.view_as_complex(pairs.unflatten(-1, (4, 2))) * 1j).flatten(-2)
        return self.outer(torch.cat([plain, turned], dim=-1))


def test_complex_numbers_do_not_mind_an_odd_number_of_others_beside_them() -> None:
    turned = trace(Turned())
    plain = next(g for g in turned.groups if g.size == 6)
    plan = turned.without({plain: [2]})
    assert turned.report(turned.graph(plan), plan).sound


class Attentive(nn.Module):
    """Attention that is asked for its weights, as it is by default, and whose weights nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 5, batch_first=True)
        self.outer = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        made, _ = self.attention(x, x, x)
        return self.outer(made)


def test_what_nobody_reads_holds_nothing() -> None:
    attentive = trace(Attentive(), {"x": torch.randn(3, 11, 20)})
    (heads,) = attentive.able("kv_head")
    plan = attentive.without({heads: [1, 3]})
    assert attentive.report(attentive.graph(plan), plan).sound
