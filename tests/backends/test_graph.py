"""The graph backend runs at other sizes, and says so where it cannot."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from tests.roads import traced


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


def reloaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert isinstance(found, nn.Module)
    return found


@pytest.mark.parametrize("again", [copy.deepcopy, reloaded])
def test_a_copy_of_a_graph_asks_the_same_of_its_inputs(again: Callable[[nn.Module], nn.Module]) -> None:
    model = Longer().eval()
    plan = sir.plan(sir.trace(model, torch.randn(3, 7, 12)), ratio=0.2, kinds=("ffn",))
    graph = sir.shear(model, plan, backend="graph").eval()
    made, x = again(graph), torch.randn(2, 5, 12)
    assert made.training == graph.training
    assert torch.equal(made(x)[0], graph(x)[0])
    assert torch.equal(made(x=x)[0], graph(x)[0])
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in graph.parameters()}
    with pytest.raises(
        sir.ShearingError, match=r"another way than the one that was traced, for which x.shape\[1\] <= 8"
    ):
        made(torch.randn(2, 11, 12))
    twice = copy.deepcopy(made)
    with pytest.raises(sir.ShearingError, match="another way"):
        twice(torch.randn(2, 11, 12))


@pytest.mark.parametrize("again", [copy.deepcopy, reloaded])
@pytest.mark.parametrize("name", ["llama_gqa", "mixtral", "t5"])
def test_a_copy_of_a_graph_is_the_same_function(name: str, again: Callable[[nn.Module], nn.Module]) -> None:
    family = traced(name)
    plan = sir.plan(family.program, ratio=0.2, importance="order")
    graph = family.sheared_graph(plan)
    with torch.no_grad():
        assert torch.equal(again(graph)(**family.feed)[0], graph(**family.feed)[0])
    assert [(n, p.requires_grad) for n, p in again(graph).named_parameters()] == [
        (n, p.requires_grad) for n, p in graph.named_parameters()
    ]
