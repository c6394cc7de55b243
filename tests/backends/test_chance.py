"""A model whose forward draws random numbers cannot be compared, and is told so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir


class Noisy(nn.Module):
    """An MLP that adds noise to what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 10)
        self.outer = nn.Linear(10, 9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(torch.relu(self.inner(x)))
        return y + torch.rand(9)


def test_a_random_forward_is_neither_sound_nor_merely_unsound() -> None:
    model = Noisy().eval()
    plan = sir.plan(sir.trace(model), ratio=0.2, kinds=("ffn",))
    graph = sir.shear(model, plan, backend="graph")
    with pytest.raises(sir.UnsoundError, match="when it reads one input twice: its forward draws random numbers"):
        sir.verify(model, graph, plan)


def test_modules_of_a_random_forward_are_refused_for_what_they_are() -> None:
    model = Noisy().eval()
    plan = sir.plan(sir.trace(model), ratio=0.2, kinds=("ffn",))
    with pytest.raises(sir.ShearingError, match="the trace of Noisy is not its function"):
        sir.shear(model, plan)
