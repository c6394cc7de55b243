"""Ways through forward that a trace does not see: what they touch stays whole, and the reason names them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir

pytestmark = pytest.mark.lengths


class Mlp(nn.Module):
    """Up and down, with something in between that depends on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(5, 13), nn.Linear(13, 3), nn.Dropout(0.5)


class Trained(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.training:
            hidden = hidden * hidden.softmax(-1)
        return self.down(hidden.relu())  # type: ignore[no-any-return]


class Told(Mlp):
    """Calls the same operator in both modes, over another axis."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1 if self.training else 0))  # type: ignore[no-any-return]


class Normed(Mlp):
    """Has a batch norm that is told its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(13)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        moments = (norm.running_mean, norm.running_var)
        hidden = nn.functional.batch_norm(self.up(x), *moments, norm.weight, norm.bias, self.training)
        return self.down(hidden.relu())  # type: ignore[no-any-return]


class Gated(Mlp):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = self.up(x)
        if gate is not None:
            hidden = hidden.roll(1, -1)
        return self.down(hidden.relu())  # type: ignore[no-any-return]


class Longer(Mlp):
    """Looks at its hidden units once more where there are many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(5, 5), nn.Linear(13, 13)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.first(x))
        if x.shape[0] > 8:
            hidden = self.other(hidden)
        return self.down(hidden.relu())  # type: ignore[no-any-return]


class Swapped(nn.Module):
    """Calls the same operators on the same shapes in both modes, in another order of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.down = nn.Linear(5, 13), nn.Linear(5, 13), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        return self.down(torch.cat((two, one) if self.training else (one, two), -1))  # type: ignore[no-any-return]


class Helped(Mlp):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.down(self._turned(self.up(x), gate).relu())  # type: ignore[no-any-return]

    def _turned(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        return hidden if gate is None else hidden.roll(1, -1)


class Matched(Mlp):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = self.up(x)
        match gate:
            case None:
                return self.down(hidden.relu())  # type: ignore[no-any-return]
            case _:
                return self.down(hidden.roll(1, -1).relu())  # type: ignore[no-any-return]


class Picked(Mlp):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = self.up(x)
        return self.down([hidden, hidden.roll(1, -1)][gate is not None].relu())  # type: ignore[no-any-return]


class Moded(Mlp):
    def forward(self, x: Tensor, mode: str = "plain") -> Tensor:
        hidden = self.up(x)
        return self.down((hidden.roll(1, -1) if mode == "rolled" else hidden).relu())  # type: ignore[no-any-return]


class Keyed(Mlp):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        hidden = self.up(x)
        return self.down((hidden.roll(1, -1) if "roll" in more else hidden).relu())  # type: ignore[no-any-return]


class Handing(nn.Module):
    """Hands its argument on to what it holds, and to torch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 5)), inner

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.inner(nn.functional.linear(self.first(x), torch.eye(5), gate), gate)  # type: ignore[no-any-return]


class Dropping(Mlp):
    """Is trained with dropout, in three spellings, which is neutral."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            scale = torch.ones(3)
        hidden = nn.functional.dropout(self.drop(self.up(x)), 0.3 if self.training else 0.0, self.training)
        return self.down(torch.dropout(hidden, 0.2, self.training).relu()) * scale  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Holds one of them beside a plain one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 5)), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))  # type: ignore[no-any-return]


def hidden(model: nn.Module, size: int = 13) -> tuple[bool, str]:
    group, *_ = [g for g in sir.groups(sir.trace(model, torch.randn(2, 5))) if g.size == size]
    return group.prunable, group.reason or ""


@pytest.mark.parametrize("mode", [True, False])
def test_what_training_mode_does_otherwise_holds_what_it_touches(mode: bool) -> None:
    model = Trained().train(mode)
    assert hidden(model) == (False, "the forward of the model (Trained) takes another way in training mode")
    assert model.training == mode
    assert "training" not in vars(nn.Module)


def test_one_operator_that_is_told_otherwise_is_another_way() -> None:
    assert hidden(Told().eval()) == (False, "the forward of the model (Told) takes another way in training mode")
    assert hidden(Normed().eval()) == (True, "")


def test_a_module_with_another_way_is_held_and_its_neighbours_are_not() -> None:
    model = Deep(Trained()).eval()
    assert hidden(model) == (False, "the forward of inner (Trained) takes another way in training mode")
    assert hidden(model, 11) == (True, "")


def test_an_argument_that_was_not_given_holds_what_forward_computes() -> None:
    said = "the forward of Gated does something else with gate, which was not given"
    assert hidden(Gated().eval()) == (False, said)
    program = sir.trace(Gated().eval(), {"x": torch.randn(2, 5), "gate": torch.randn(2)})
    (group,) = [g for g in sir.groups(program) if g.size == 13]
    assert not group.prunable  # rolled
    assert "gate" not in str(group.reason)


@pytest.mark.parametrize(("kind", "name"), [
    (Helped, "gate"), (Matched, "gate"), (Picked, "gate"), (Moded, "mode"), (Keyed, "more"),
])  # fmt: skip
def test_however_forward_decides_by_an_argument(kind: type[nn.Module], name: str) -> None:
    said = f"does something else with {name}, which was not given"
    assert hidden(kind().eval()) == (False, f"the forward of {kind.__name__} {said}")
    inside = Handing(kind()).eval() if name == "gate" else Deep(kind()).eval()
    assert hidden(inside) == (False, f"the forward of inner ({kind.__name__}) {said}")
    assert hidden(inside, 11) == (True, "")


def test_operators_that_read_other_values_are_another_way() -> None:
    assert hidden(Swapped().eval()) == (False, "the forward of the model (Swapped) takes another way in training mode")


def test_a_parameter_that_nothing_read_holds_the_sizes_that_it_has() -> None:
    said = "no way through the model (Longer) that was traced reads other.weight, and another may"
    assert hidden(Longer().eval()) == (False, said)
    program = sir.trace(Longer().eval(), torch.randn(9, 5))
    assert not program.held
    assert hidden(Deep(Longer()).eval(), 11) == (True, "")


def test_dropout_and_defaults_are_no_other_way() -> None:
    assert hidden(Dropping().eval()) == (True, "")


def test_a_language_model_has_one_way() -> None:
    from tests.roads import traced

    assert not traced("llama_gqa").program.held


class PassesOn(nn.Module):
    """No call of its own: all it does is hand values from one of its modules to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
        self.flag = False


class HandsGiven(PassesOn):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        h = self.act(self.up(x))
        if gate is not None:
            h = h.roll(1, -1)
        return self.down(h)


class HandsInTraining(PassesOn):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        if self.training:
            h = h * h.softmax(-1)
        return self.down(h)


class HandsUnread(PassesOn):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        if self.flag:
            h = h * self.extra
        return self.down(h)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (HandsGiven, "gate, which was not given"),
        (HandsInTraining, "another way in training mode"),
        (HandsUnread, r"reads (0\.)?extra"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_module_only_hands_on_is_held_too(kind: type[nn.Module], said: str, inside: bool) -> None:
    model = nn.Sequential(kind(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) if inside else kind()
    found = {g.size: g for g in sir.groups(sir.trace(model.eval(), {"input" if inside else "x": torch.randn(2, 7, 8)}))}
    assert re.search(said, found[32].reason)
    assert not inside or found[16].prunable


class Discards(nn.Module):
    """In training mode it looks for a faster way, as kernels that are not there leave it, and finds none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.up.weight[None].squeeze(0).exp()
        return self.down(self.up(x).relu())


def test_calls_that_nothing_comes_of_are_no_other_way() -> None:
    program = sir.trace(Discards().eval(), {"x": torch.randn(2, 7, 8)})
    assert not program.held
    assert next(g for g in sir.groups(program) if g.size == 32).prunable
