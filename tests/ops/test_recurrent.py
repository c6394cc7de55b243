"""Recurrent layers: a unit is a row of every gate, a column of the state's matrix, an entry of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shear_ir as sir
from tests.golden import expect
from tests.ops.typed import typed
from tests.oracle.fuzz.check import check_model, double


def test_an_lstm_has_its_unit_in_four_gates() -> None:
    def call(x: Tensor, h: Tensor, c: Tensor, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return torch.lstm(x, [h, c], [a, b, p, q], True, 1, 0.0, False, False, True)[0]  # type: ignore[attr-defined]

    sizes = {"x": (3, 5, 7), "h": (1, 3, 4), "c": (1, 3, 4), "a": (16, 7), "b": (16, 4), "p": (16,), "q": (16,)}
    expect(
        typed(call, **sizes),
        """
        x [a:3, b!:5, c:7]
        h [1, a:3, d:4]
        c [1, a:3, d:4]
        a [(d:4 | d:4 | d:4 | d:4), c:7]
        b [(d:4 | d:4 | d:4 | d:4), d:4]
        p [(d:4 | d:4 | d:4 | d:4)]
        q [(d:4 | d:4 | d:4 | d:4)]
        -> [a:3, b!:5, d:4]
        b: states follow each other at %lstm_input = aten.lstm.input
        """,
    )


def states_are_told_rightly() -> bool:
    """Whether torch knows on shapes alone what an LSTM makes: 2.11 adds a dim to its states."""
    with FakeTensorMode():
        _, (state, _) = nn.LSTM(8, 6)(torch.randn(3, 2, 8))
    return tuple(state.shape) == (1, 2, 6)


class Tagger(nn.Module):
    """A recurrent layer between two plain ones; its last state is read as well."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.cell, self.out, self.last = nn.Linear(5, 8), cell, nn.Linear(width, 7), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.cell(torch.tanh(self.stem(x)))
        return self.out(y), self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "cell",
    [
        lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True),
        lambda: nn.GRU(8, 6, bias=False),
        lambda: nn.RNN(8, 6, nonlinearity="relu", num_layers=2),
    ],
    ids=["lstm of two layers, both ways", "gru without bias", "plain with relu"],
)
def test_hidden_units_of_all_layers_and_ways_go_together(cell: type[nn.Module]) -> None:
    layer = cell()
    if isinstance(layer, nn.LSTM) and not states_are_told_rightly():
        pytest.skip("this release of torch tells the shape of an LSTM's states wrongly, and none of it is cut")
    model = Tagger(layer, 12 if getattr(layer, "bidirectional", False) else 6).double().eval()
    feeds = [{"x": torch.randn(2, 3, 5).double()} for _ in range(2)]
    with double(), torch.no_grad():
        seen = check_model(model, feeds)
    assert seen.prunable == 2
    assert seen.moved == seen.plans > 4
    assert seen.modules["cut"]


def test_a_projected_state_is_held() -> None:
    model = Tagger(nn.LSTM(8, 9, proj_size=6), 6)
    groups = sir.groups(sir.trace(model, {"x": torch.randn(2, 3, 5)}))
    reasons = {g.reason for g in groups if "cell.weight_hr_l0" in g.parameters}
    assert reasons == {"a recurrent layer with a projection of its state at %lstm_input = aten.lstm.input"}


class Steps(nn.Module):
    """A cell that forward calls for each step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.stem, self.cell, self.out = nn.Linear(5, 8), cell, nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in torch.tanh(self.stem(x)).unbind(1):
            state = self.cell(step, state)
        out: Tensor = self.out(state[0] if isinstance(state, tuple) else state)
        return out


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_units_of_a_cell_go_in_all_of_its_gates(cell: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Steps(cell(8, 6)).eval(), torch.randn(2, 3, 5)
    program = sir.trace(model, x)
    groups = {g.size: g for g in sir.groups(program) if g.prunable}
    assert groups.keys() == {8, 6}
    plan = sir.plan(program, ratio=0.3, kinds=sorted({g.kind for g in groups.values()}))
    assert {c.size for c in plan.cuts} == {8, 6}
    small = sir.shear(model, plan, inputs=x)
    sir.verify(model, small, plan, x).raise_if_unsound()
    assert small.cell.hidden_size < 6  # type: ignore[union-attr, operator]
