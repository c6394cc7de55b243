"""What random programs have found, each as the smallest module that shows it: all of them are sound now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracle.fuzz.check import Seen, check_model, double


def sound(model: nn.Module, *shapes: tuple[int, ...]) -> Seen:
    """What was exercised on a module in double precision; raises where it is not sound."""
    names = list(model.forward.__code__.co_varnames[1 : 1 + len(shapes)])
    feeds = [{name: torch.randn(shape).double() for name, shape in zip(names, shapes, strict=True)} for _ in range(2)]
    with double(), torch.no_grad():
        seen = check_model(model.double().eval(), feeds)
    assert not seen.untraced
    return seen


class DefaultEpsilon(nn.Module):
    """A norm whose epsilon is that of its precision, read by what is as small as its square root."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.rms_norm(self.up(x), (12,)))


def test_the_default_epsilon_of_a_norm_is_that_of_its_precision() -> None:
    assert sound(DefaultEpsilon(), (3, 5)).prunable


class Ramp(nn.Module):
    """Channels weighed by their number: after a cut, the numbers that are left are a constant of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * torch.arange(1.0, 13.0))


def test_a_plan_for_a_sheared_graph_composes_though_the_first_cut_left_a_constant() -> None:
    assert sound(Ramp(), (3, 5)).plans > 2


class Tiled(nn.Module):
    """Copies of the channels, counted for the last dim alone: a copy is a unit, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tile(self.up(x), (2,)))


def test_copies_counted_for_the_last_dim_alone_can_go() -> None:
    assert sound(Tiled(), (3, 4, 5)).prunable == 2


class NarrowRouter(nn.Module):
    """Experts scored by a matrix of one column, which is not a vector of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(1, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 1)), nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        scores = torch.where(scores >= scores.topk(2, -1)[0][..., -1:], scores, 0.0)
        inner = torch.relu(torch.einsum("bth,efh->betf", x, self.up))
        return torch.einsum("betf,ehf,bte->bth", inner, self.down, scores)


def test_a_router_of_one_column_is_a_matrix_in_the_reference() -> None:
    assert sound(NarrowRouter(), (5, 3, 1)).plans


class Scaled(nn.Module):
    """Channels divided by a statistic of their own, which is zero where the channel is."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(5, 6), nn.Linear(6, 7), scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y / self.scale(y))


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda y: y.abs().amax(1, keepdim=True),
    "largest and place": lambda y: y.abs().max(1, keepdim=True)[0],
    "spread": lambda y: y.std(1, keepdim=True),
    "product": lambda y: y.prod(1, keepdim=True),
    "running product": lambda y: y.cumprod(1),
    "root of squares": lambda y: torch.hypot(y, y),
    "windows": lambda y: y.repeat(1, 2, 1).unfold(1, 2, 2)[..., 0],
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_channel_is_not_divided_by_what_vanishes_with_it(name: str) -> None:
    assert sound(Scaled(STATISTICS[name]), (2, 5, 5)).frozen["removed entries would be divided by"] == 1
