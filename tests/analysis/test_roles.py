"""What an axis is for, where a norm runs over it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shear_ir as sir


class Normed(nn.Module):
    """A norm between two maps, over what the first one makes or over what is activated first."""

    def __init__(self, activated: bool) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(10, 14), nn.RMSNorm(14), nn.Linear(14, 6)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        made = self.up(x)
        return torch.tanh(self.down(self.norm(nn.functional.silu(made) if self.activated else made)))


def kind_between(model: Normed) -> str:
    groups = sir.groups(sir.trace(model, {"x": torch.randn(3, 7, 10)}))
    (between,) = (g for g in groups if "norm.weight" in g.parameters)
    assert between.rescalable
    return between.kind


def test_a_latent_that_is_normed_as_it_is_made_is_no_channel_of_an_mlp() -> None:
    assert kind_between(Normed(activated=False)) == "other"


def test_channels_that_are_normed_once_they_are_activated_are_those_of_an_mlp() -> None:
    assert kind_between(Normed(activated=True)) == "ffn"
