"""The graph backend runs at other sizes, and says so where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir


class Scan(nn.Module):
    """An MLP on one position after the other, which Python counts: a trace is as long as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 10)
        self.outer = nn.Linear(10, 9)

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.outer(torch.relu(self.inner(step))) for step in x.unbind(1)]
        return torch.stack(steps, 1)


@pytest.fixture(scope="module")
def graph() -> nn.Module:
    model = Scan().eval()
    program = sir.trace(model, torch.randn(3, 7, 12))
    plan = sir.plan(program, ratio=0.2, kinds=("ffn",))
    return sir.shear(model, plan, backend="graph", inputs=torch.randn(3, 7, 12))


def test_a_graph_runs_at_another_batch_size(graph: nn.Module) -> None:
    (found,) = graph(torch.randn(5, 7, 12))
    assert found.shape == (5, 7, 9)


@pytest.mark.parametrize("named", [False, True])
def test_a_length_that_forward_counts_is_said_to_be_fixed(graph: nn.Module, named: bool) -> None:
    longer = torch.randn(3, 8, 12)
    said = "x has size 8 in dim 1, but the graph runs at 7 alone, the size it was traced with: use the module backend"
    with pytest.raises(sir.ShearingError, match=said):
        graph(x=longer) if named else graph(longer)


class Longer(nn.Module):
    """An MLP that takes another way beyond eight positions; the trace is of the one way alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 10)
        self.outer = nn.Linear(10, 9)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.inner(x))
        return self.outer(inner.cumsum(1) if x.shape[1] > 8 else inner)


def test_a_length_at_which_forward_takes_another_way_is_refused_and_not_computed_wrongly() -> None:
    model = Longer().eval()
    plan = sir.plan(sir.trace(model, torch.randn(3, 7, 12)), ratio=0.2, kinds=("ffn",))
    graph = sir.shear(model, plan, backend="graph", inputs=torch.randn(3, 7, 12))
    assert graph(torch.randn(2, 5, 12))[0].shape == (2, 5, 9)
    with pytest.raises(sir.ShearingError, match=r"at these sizes \(x \(2, 11, 12\)\) the model takes another way"):
        graph(torch.randn(2, 11, 12))
