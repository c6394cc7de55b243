"""Attributes that hold sizes: the likeliest new values come first, and of what only looks like a size nothing is set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.module.attributes import Overrides, apply_attributes, candidates, optional, without
from shear_ir.frontend.inputs import as_inputs
from shear_passes.rewrite.cuts import checked


class Heads(nn.Module):
    """``window`` is 12, as wide as the channels of ``up``, and has nothing to do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 12
        self.heads, self.width = 3, 4
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        split = self.up(x).unflatten(-1, (self.heads, self.width)).relu()
        made: Tensor = self.down(split.flatten(-2))
        return made


def first(model: nn.Module) -> Overrides:
    feed = as_inputs(model, torch.randn(2, 8))
    program = sir.trace(model, feed)
    groups = sir.groups(program)
    widths = tuple(g.name for g in groups if g.prunable and g.size != 3)
    plan = sir.plan(program, ratio=0.2, kinds=("ffn",), frozen=widths, importance="order", stock=False)
    return next(candidates(model, groups, checked(groups, plan).masks, feed))


def test_the_number_of_heads_follows_and_their_width_does_not() -> None:
    overrides = first(Heads())
    assert overrides[""]["heads"] == 2
    assert "width" not in overrides[""]
    assert (overrides["up"]["out_features"], overrides["down"]["in_features"]) == (8, 8)


def test_what_no_constructor_made_of_a_size_may_be_left_out() -> None:
    model = Heads()
    overrides: Overrides = {"": {"heads": 2, "window": 8}, "up": {"out_features": 8}}
    names = {name for _, name in optional(model, overrides)}
    assert "window" in names
    assert "out_features" not in names


def test_one_attribute_of_some_modules_is_taken_out() -> None:
    overrides: Overrides = {"a": {"heads": 2, "window": 8}, "b": {"window": 8}, "c": {"window": 8}}
    assert without(overrides, ["a", "b"], "window") == {"a": {"heads": 2}, "c": {"window": 8}}


def test_a_config_that_modules_share_is_copied_where_it_changes() -> None:
    class Config:
        heads = 3

    model = nn.ModuleList([nn.Module(), nn.Module()])
    model[0].config = model[1].config = Config()  # type: ignore[assignment]
    model[0].shape = (3, 4)  # type: ignore[assignment]
    apply_attributes(model, {"0": {"config.heads": 2, "shape": [2, 4]}})
    assert (model[0].config.heads, model[1].config.heads) == (2, 3)
    assert model[0].shape == (2, 4)
