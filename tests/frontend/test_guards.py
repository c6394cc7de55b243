"""What forward asks of the sizes of its inputs is found, tried on the other side, and told where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.frontend.guards import size_guards
from tests.zoo import build, randomised

pytestmark = pytest.mark.lengths


class Asks(nn.Module):
    """A block of 8 whose result is scaled where there are more than ``most`` positions."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.most, self.scale = f"{most}", 1.0  # a text, so that no size is read out of the module

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(self.up(x).relu())
        return h * self.scale if x.shape[1] > int(self.most) else h


def test_a_condition_is_told_by_the_name_of_its_argument() -> None:
    (guard,) = size_guards(Asks(20), {"x": torch.zeros(2, 7, 6)})
    assert (str(guard), guard.numbers) == ("x.shape[1] <= 20", {20})
    assert guard.holds({"x": torch.zeros(1, 20, 6)})
    assert not guard.holds({"x": torch.zeros(1, 21, 6)})
    assert size_guards(build("llama_gqa"), {"input_ids": torch.zeros(2, 7, dtype=torch.long)}) == ()


def test_what_lies_behind_a_condition_is_compared() -> None:
    model = randomised(Asks(20).eval())
    x = torch.randn(2, 7, 6)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    small = sir.shear(model, plan)
    report = sir.verify(model, small, plan)
    assert report.sound
    assert max(size[1] for size in report.lengths) > 20
    small.scale = 1.01
    assert not sir.verify(model, small, plan).sound
    assert sir.verify(model, small, plan, x).sound  # where inputs are given, they are all that is asked


def test_a_condition_too_far_away_is_told() -> None:
    model = randomised(Asks(100_000).eval())
    x = torch.randn(2, 7, 6)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    report = sir.verify(model, sir.shear(model, plan), plan)
    assert "forward asks x.shape[1] <= 100000, which all of these meet" in report.notes


@pytest.mark.parametrize("name", ["bert"])
def test_where_a_model_ends_nothing_is_told(name: str) -> None:
    model = build(name)
    plan = sir.plan(sir.trace(model), ratio=0.3)
    report = sir.verify(model, sir.shear(model, plan), plan)
    assert report.sound
    assert not [note for note in report.notes if "forward asks" in note]


class Counts(nn.Module):
    """Scales its result by the number of rows, or by the size of images."""

    def __init__(self, images: bool, one: bool) -> None:
        super().__init__()
        self.images, self.one = images, one
        self.up: nn.Module = nn.Conv2d(3, 8, 3) if images else nn.Linear(6, 8)
        self.down: nn.Module = nn.Conv2d(8, 3, 3) if images else nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        asked = x.shape[-1] > 48 if self.images else x.shape[0] == 1 if self.one else x.shape[0] > 40
        if asked:
            hidden = hidden.softmax(1 if self.images else -1)
        return self.down(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("images", "one"), [(True, False), (False, True), (False, False)])
def test_rows_and_images_of_other_sizes_are_compared(images: bool, one: bool) -> None:
    model = randomised(Counts(images, one).eval())
    x = torch.randn(2, 3, 20, 20) if images else torch.randn(2, 5, 6)
    program = sir.trace(model, x)
    plan = sir.plan(program, ratio=0.3, kinds=["conv_channel" if images else "ffn"], importance="random")
    if not one:  # a trace tells
        with pytest.raises(sir.ShearingError, match="takes another way than with"):
            sir.shear(model, plan)
        return
    report = sir.verify(model, sir.shear(model, plan), plan)
    assert not report.sound
    assert report.judge == "numbers"
    assert "so that forward has another way there" in str(report)


class AtOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        if x.shape[1] == 1:
            h = h.softmax(-1)
        made: Tensor = self.down(h)
        return made


def test_another_way_at_one_position_is_found() -> None:
    model, feed = AtOne().eval(), {"x": torch.randn(2, 7, 8)}
    plan = sir.plan(sir.trace(model, feed), ratio=0.3)
    report = sir.verify(model, sir.shear(model, plan, inputs=feed), plan)
    assert not report.sound
    assert report.place == "one position"


class AtTwo(AtOne):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        if x.shape[1] == 2:
            h = h.softmax(-1)
        made: Tensor = self.down(h)
        return made


def test_a_way_in_which_the_plan_is_not_possible_is_refused_before_anything_is_cut() -> None:
    model, feed = AtTwo().eval(), {"x": torch.randn(2, 7, 8)}
    plan = sir.plan(sir.trace(model, feed), ratio=0.3)
    with pytest.raises(sir.ShearingError, match=r"with inputs of 3 x 2 x 8, .* takes another way .* softmax runs over"):
        sir.shear(model, plan, inputs=feed)
