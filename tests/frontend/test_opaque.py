"""Modules that torch.export cannot look into: one call each, frozen, while the rest is sheared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import TraceError
from tests.roads import Traced, outputs, trace
from tests.zoo import randomised

HIDDEN, FFN, INNER = 12, 20, 14


class Picky(nn.Module):
    """Takes one of two ways, by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        inner = self.up(x) * scale
        return self.down(torch.relu(inner) if inner.sum() > 0 else torch.tanh(inner))


class Block(nn.Module):
    """A channel mixer that can be traced, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, FFN)
        self.out = nn.Linear(FFN, HIDDEN)
        self.picky = Picky()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.relu(self.gate(x)))
        return x + self.picky(x, scale=0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def net() -> Traced:
    return trace(randomised(Net()))


def test_what_cannot_be_traced_is_one_call(net: Traced) -> None:
    calls = [node for node in net.program.calls() if "opaque" in str(node.target)]
    assert len(calls) == 2
    assert not [n for n in net.program.calls() if "picky" in n.name and "linear" in str(n.target)]


def test_what_it_reads_is_frozen_by_name_and_the_rest_can_be_sheared(net: Traced) -> None:
    assert [g.size for g in net.able("ffn")] == [FFN, FFN]
    held = {g.size: g.reason for g in net.groups if not g.prunable}
    assert "shear_ir.opaque" in held[INNER]
    assert not held.keys() & {FFN}


def test_both_backends_compute_the_masked_original_at_two_lengths(net: Traced) -> None:
    plan = net.without({g: [1, 7, 8] for g in net.able("ffn")})
    for backend in ("module", "graph"):
        report = sir.verify(net.model, sir.shear(net.model, plan, backend=backend), plan)  # type: ignore[arg-type]
        assert report.sound
        assert len(set(report.lengths)) >= 2
        assert report.moved > 0.05


def test_it_takes_both_ways_in_the_graph(net: Traced) -> None:
    graph = sir.shear(net.model, net.without({net.able("ffn")[0]: [3]}), backend="graph")
    whole = sir.shear(net.model, net.without({net.able("ffn")[0]: [3]}))
    for sign in (-3.0, 3.0):
        feed = {"x": sign * torch.rand(2, 16, HIDDEN)}
        torch.testing.assert_close(outputs(graph, feed), outputs(whole, feed))


def test_gradients_flow_through_it(net: Traced) -> None:
    plan = net.without({net.able("ffn")[0]: [3]})
    graph, whole = sir.shear(net.model, plan, backend="graph"), sir.shear(net.model, plan)
    for model in (graph, whole):
        sum(t.square().sum() for t in outputs_with_gradients(model, net.feed)).backward()  # type: ignore[union-attr]
    expected = dict(whole.named_parameters())
    for name, parameter in graph.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def outputs_with_gradients(model: nn.Module, feed: dict[str, Tensor]) -> tuple[Tensor, ...]:
    made = model(**feed)
    return made if isinstance(made, tuple) else (made,)


class Everything(nn.Module):
    """A model that is nothing but what cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.picky = Picky()

    def forward(self, x: Tensor) -> Tensor:
        return self.picky(x, scale=2.0)


def test_a_graph_that_calls_modules_is_in_no_file(net: Traced, tmp_path: Path) -> None:
    plan = sir.plan(net.program, ratio=0.1, importance="random")
    small = sir.shear(net.model, plan, backend="graph")
    with pytest.raises(sir.ShearingError, match="modules that were not looked into, which no file holds"):
        sir.save(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_which_nothing_would_be_left_is_refused() -> None:
    with pytest.raises(TraceError, match=r"in module picky \(Picky\)"):
        sir.trace(Everything())


class Routed(nn.Module):
    """Reads how many entries are positive, and as many of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(HIDDEN, INNER)
        self.back = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        places = (x.flatten(0, -2).sum(-1) > 0).nonzero().squeeze(-1)
        chosen = self.back(torch.relu(self.own(x.flatten(0, -2)[places])))
        return torch.zeros_like(x).flatten(0, -2).index_add(0, places, chosen).view_as(x)


class RoutedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.picky = Routed()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.relu(self.gate(x)))
        return x + self.picky(x)


class RoutedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RoutedBlock(), RoutedBlock()])


def test_a_module_whose_sizes_are_read_out_of_tensors_is_one_call_as_well() -> None:
    routed = trace(randomised(RoutedNet()))
    assert sum("opaque" in str(node.target) for node in routed.program.calls()) == 2
    plan = routed.without({g: [2, 5] for g in routed.able("ffn") if g.size == FFN})
    report = sir.verify(routed.model, sir.shear(routed.model, plan, backend="graph"), plan)
    assert report.sound
    assert len(set(report.lengths)) >= 2
