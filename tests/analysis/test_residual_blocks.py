"""Blocks and memory: what a block writes to must be its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shear_backends.verify.numbers import difference
from tests.roads import Traced, outputs, trace
from tests.zoo import randomised

Body = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """``up``, something done with memory, ``down``."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.up, self.down, self.body = nn.Linear(10, 14), nn.Linear(14, 10), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Stack(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(body) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        for layer in self.layers:
            x = layer(x)
        return x * 2


def fills_a_buffer(self: Layer, x: Tensor) -> Tensor:
    made = self.up(x)
    buffer = torch.empty_like(made)
    buffer[..., :6] = made[..., 8:]
    buffer[..., 6:] = made[..., :8]
    return x + self.down(buffer)


def adds_to_zeros(self: Layer, x: Tensor) -> Tensor:
    buffer = torch.zeros(*x.shape[:-1], 14)
    buffer.add_(self.up(x))
    return x + self.down(buffer)


def adds_in_place(self: Layer, x: Tensor) -> Tensor:
    x += self.down(torch.tanh(self.up(x)))
    return x


def writes_to_a_part_of_its_entry(self: Layer, x: Tensor) -> Tensor:
    made = self.down(torch.tanh(self.up(x)))
    x[..., :5].mul_(made.mean())
    return x + made


def found(body: Body) -> Traced:
    return trace(randomised(Stack(body)), {"x": torch.randn(3, 11, 10)})


@pytest.mark.parametrize("body", [fills_a_buffer, adds_to_zeros, adds_in_place])
def test_a_block_may_write_to_what_it_made(body: Body) -> None:
    family = found(body)
    (layers,) = (g for g in family.groups.blocks if g.kind == "block")
    assert [unit.path for unit in layers.units] == ["layers.0", "layers.1", "layers.2"]
    assert not layers.fixed
    plan = family.without({layers: [1]})
    expected = Stack(body)
    expected.load_state_dict(family.model.state_dict())
    expected.layers[1] = nn.Identity()
    feed = {"x": torch.randn(3, 11, 10)}
    assert difference(outputs(expected, feed), outputs(family.graph(plan), feed)) <= 1e-6


def test_a_block_that_writes_to_what_others_made_stays() -> None:
    units = [unit for g in found(writes_to_a_part_of_its_entry).groups.blocks for unit in g.units]
    assert units
    assert all("writes in place to" in unit.reason for unit in units)


def test_a_sum_without_parameters_is_no_block() -> None:
    def body(self: Layer, x: Tensor) -> Tensor:
        scores = torch.tanh(self.up(x))
        scores = scores + scores @ (scores.transpose(-1, -2) @ scores)
        return self.down(scores)

    assert not found(body).groups.blocks
