"""What an axis is for, where a norm runs over it."""

from __future__ import annotations

from typing import Literal

import pytest
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


class ResponseNormed(nn.Module):
    """Channels scaled by their share of the response and added to themselves, as ConvNeXt V2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 6)
        self.weight, self.bias, self.eps = nn.Parameter(torch.randn(14)), nn.Parameter(torch.randn(14)), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        made = nn.functional.gelu(self.up(x))
        response = torch.linalg.vector_norm(made, dim=1, keepdim=True)
        share = response / (response.mean(-1, keepdim=True) + self.eps)
        return torch.tanh(self.down(self.weight * (made * share) + self.bias + made))


@pytest.mark.parametrize("backend", ["graph", "module"])
def test_channels_that_a_norm_of_their_own_is_added_to_are_no_stream(backend: Literal["graph", "module"]) -> None:
    torch.manual_seed(0)
    model, feed = ResponseNormed().double(), {"x": torch.randn(3, 7, 10, dtype=torch.float64)}
    program = sir.trace(model, feed)
    (channels,) = (g for g in sir.groups(program).of_axes if "weight" in g.parameters)
    assert (channels.kind, channels.rescalable) == ("ffn", True)
    plan = sir.plan(program, ratio=0.3, kinds=("ffn",))
    small = sir.shear(model, plan, backend=backend, inputs=feed)
    report = sir.verify(model, small, plan, feed)
    assert report.moved > 0.01
    assert report.max_abs_diff <= 1e-12
