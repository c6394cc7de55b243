"""Values that no parameter made and that carry a cut axis: found among a module's arguments, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.module.gathers import Gather, find_gathers, install
from shear_ir.errors import ShearingError
from shear_ir.frontend.inputs import as_inputs
from shear_passes.rewrite.cuts import checked

HEADS, WIDTH = 4, 6


class Attend(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.up, self.down = nn.Linear(8, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 8)

    def forward(self, x: Tensor, slopes: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (-1, WIDTH))
        made: Tensor = self.down((heads.relu() * slopes[:, None]).flatten(-2))
        return made


class Biased(nn.Module):
    """Slopes, one for each head, are made by the outer module and handed down, as ALiBi's are."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled
        self.attend = Attend(scaled)

    def forward(self, x: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
        made: Tensor = self.attend(x, slopes)
        return made


def found(model: nn.Module) -> tuple[list[Gather], list[int]]:
    feed = as_inputs(model, torch.randn(3, 8))
    program = sir.trace(model, feed)
    groups = sir.groups(program)
    heads = next(g for g in groups if g.size == HEADS and g.prunable)
    plan = sir.plan(program, ratio=0.4, kinds=(heads.kind,), importance="order", stock=False)
    kept = next(cut.kept for cut in plan.cuts if cut.group == heads.name)
    return find_gathers(model, groups, checked(groups, plan).masks, feed), [int(i) for i in kept]


def test_the_argument_with_a_value_for_each_head_is_found() -> None:
    (gather,), kept = found(Biased())
    assert (gather.module, gather.argument, gather.dim, gather.period) == ("attend", 1, 0, HEADS)
    assert list(gather.kept) == kept


def test_an_installed_gather_keeps_the_values_of_the_heads_that_stay() -> None:
    model = Biased()
    (gather,), kept = found(model)
    seen: list[Tensor] = []
    model.attend.forward = lambda x, slopes: seen.append(slopes) or x  # type: ignore[method-assign, func-returns-value]
    install(model, [gather])
    model(torch.randn(3, 8))
    assert torch.equal(seen[0], (2.0 ** -torch.arange(1.0, HEADS + 1))[kept])


def test_a_value_that_is_no_argument_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Biased()
    monkeypatch.setattr("shear_backends.module.gathers._argument", lambda call, value: None)
    with pytest.raises(ShearingError, match=r"attend uses .* not one of its arguments: use the graph backend"):
        found(model)
