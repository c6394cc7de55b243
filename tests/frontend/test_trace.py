"""A trace that fails says so once; what is traced runs."""

from __future__ import annotations

import logging
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir


class Mismatched(nn.Module):
    """Multiplies matrices that do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 10)
        self.narrow = nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x))


def test_a_failed_trace_names_the_module_and_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    with pytest.raises(sir.TraceError, match=r"Mismatched cannot be traced: in module narrow \(Linear\)"):
        sir.trace(Mismatched(), torch.randn(3, 12))
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before


class Mapped(nn.Module):
    """Masks by a function of two positions that ``vmap`` lays out, and which no other part knows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 11)
        self.narrow = nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        rows = torch.vmap(lambda i, j: i >= j, in_dims=(None, 0))
        mask = torch.vmap(rows, in_dims=(0, None))(places, places)
        return self.narrow(mask.float() @ self.wide(x))


@pytest.mark.parametrize("backend", ["graph", "module"])
def test_a_mapped_function_is_traced_with_the_dims_it_has(backend: Literal["graph", "module"]) -> None:
    model, x = Mapped(), torch.randn(4, 7, 3)
    program = sir.trace(model, x)
    assert not sir.groups(program).axes.barriers
    plan = sir.plan(program, ratio=0.3, kinds=("head_dim",))
    assert plan.kept["wide.weight"][0].size < 11
    small = sir.shear(model, plan, inputs=x, backend=backend)
    sir.verify(model, small, plan, [{"x": x}, {"x": torch.randn(5, 9, 3)}]).raise_if_unsound()


@pytest.mark.parametrize("parameter", [False, True])
def test_what_is_written_to_beside_a_mapped_function_is_no_output(parameter: bool) -> None:
    class Counting(Mapped):
        def __init__(self) -> None:
            super().__init__()
            if parameter:
                self.seen = nn.Parameter(torch.zeros(3), requires_grad=False)
            else:
                self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x.mean((0, 1)))
            return super().forward(x)

    with pytest.raises(sir.TraceError, match="beside a vmap, seen is written to in place"):
        sir.trace(Counting(), torch.randn(4, 7, 3))
