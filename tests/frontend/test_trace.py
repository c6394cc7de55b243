"""A trace that fails says so once."""

from __future__ import annotations

import logging

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
