"""What the copy of an exported graph lays open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir


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
