"""What random programs and hand-written divisors found, each as the smallest module that shows it: all are sound now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from tests.oracle.fuzz.check import Seen, check_model, check_quickly, double

Check = Callable[[nn.Module, list[dict[str, Tensor]]], Seen]


def sound(model: nn.Module, *shapes: tuple[int, ...], check: Check = check_model) -> Seen:
    """What was exercised on a module in double precision; raises where it is not sound."""
    names = list(model.forward.__code__.co_varnames[1 : 1 + len(shapes)])
    feeds = [{name: torch.randn(shape).double() for name, shape in zip(names, shapes, strict=True)} for _ in range(2)]
    with double(), torch.no_grad():
        seen = check(model.double().eval(), feeds)
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


class Normed(nn.Module):
    """A norm that is one call and loses channels, read by what tells its epsilon."""

    def __init__(self, eps: float | None) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 12), nn.RMSNorm(12, eps), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x) * 1e-5))


@pytest.mark.parametrize("eps", [1e-5, None])
def test_the_modules_scale_the_epsilon_of_a_norm_too(eps: float | None) -> None:
    assert sound(Normed(eps), (3, 5)).modules["cut"]


class Written(nn.Module):
    """A norm written out, whose epsilon stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 7)
        self.weight = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight)


def test_an_epsilon_in_the_code_cannot_follow_however_little_it_is() -> None:
    seen = sound(Written(), (3, 5))
    assert seen.prunable == 1
    assert seen.modules == {"refused": 2}
    model = Written()
    plan = sir.plan(sir.trace(model, torch.randn(3, 5)), ratio=0.3, kinds=("other",))
    with pytest.raises(sir.ShearingError, match="the eps of the norm at the root, 1e-05, stands in its code"):
        sir.shear(model, plan, inputs=torch.randn(3, 5))


class Twin(nn.Module):
    """Two norms of one module with one epsilon, of which one is narrower after a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.up, self.down = 1e-5, nn.Linear(5, 12), nn.Linear(12, 7)
        self.first, self.second = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.first
        y = self.up(x)
        return self.down(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * self.second)


def test_an_epsilon_that_a_norm_of_full_width_reads_as_well_cannot_follow() -> None:
    assert sound(Twin(), (3, 5)).modules == {"refused": 2}


class Stretch(nn.Module):
    """Some rows of what loses columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).narrow(0, 2, 7))


def test_a_stretch_of_a_dim_that_stays_is_where_it_was() -> None:
    assert sound(Stretch(), (9, 4)).modules["cut"]


class Layout(nn.Module):
    """Heads side by side, written to in place: whether they are a view of the attention hangs on its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        y.transpose(1, 2).reshape(2, 5, 12).add_(1.0)
        return y


class Flat(nn.Module):
    """A flattened transpose, written to on the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).transpose(1, 2)
        flat = y.flatten(1, 2)
        y.mul_(3)
        return self.b(y.transpose(1, 2)) + flat.sum()


class Passed(Layout):
    """The layout of the attention, passed on by a product with a number."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) * 1.5
        flat = y.transpose(1, 2).reshape(2, 5, 12)
        y.mul_(3)
        return flat


class Later(Layout):
    """The same, and nobody reads the attention afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, 3, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12).add_(1.0)


def test_what_may_or_may_not_be_a_view_holds_what_its_layout_hangs_on() -> None:
    held = sound(Layout(), (2, 5, 8))
    assert held.prunable == 0
    assert sound(Passed(), (2, 5, 8)).prunable == 0
    assert sound(Flat(), (2, 5, 12)).prunable == 0
    assert sound(Later(), (2, 5, 8)).prunable == 1


class Scalars(nn.Module):
    """A number that is an inner product of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.up, self.down = nn.Parameter(torch.randn(3)), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        number = torch.tensordot(self.weight, self.weight, dims=([0], [0]))
        return self.down(torch.inner(self.up(x), number) * torch.inner(number, number))


def test_an_inner_product_with_a_number_is_a_product() -> None:
    assert sound(Scalars(), (2, 5)).prunable == 2


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


ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda y: y.abs().amax(1, keepdim=True),
    "largest and place": lambda y: y.abs().max(1, keepdim=True)[0],
    "spread": lambda y: y.std(1, keepdim=True),
    "product": lambda y: y.prod(1, keepdim=True),
    "running product": lambda y: y.cumprod(1),
    "running sum": lambda y: y.abs().cumsum(1),
    "largest so far": lambda y: y.abs().cummax(1)[0],
    "root of squares": lambda y: torch.hypot(y, y),
    "windows": lambda y: y.repeat(1, 2, 1).unfold(1, 2, 2)[..., 0],
    "in order": lambda y: y.abs().sort(1)[0],
    "middle": lambda y: y.abs().median(1, keepdim=True)[0],
    "between": lambda y: torch.lerp(y, y, 0.5),
    "logarithm of one": lambda y: torch.log(y + 1),
    "half less half": lambda y: y.sigmoid() - 0.5,
    "written back": lambda y: (y + 1).sub_(1.0),
}
"""Divisors that are zero where the channel is."""

UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "log of running sum": lambda y: y.logcumsumexp(1),
    "scattered": lambda y: y.scatter(1, torch.zeros(2, 1, 6, dtype=torch.long), y[:, :1]),
    "added at places": lambda y: torch.zeros(2, 5, 6).index_add(1, torch.arange(5), y),
    "partly replaced": lambda y: torch.slice_scatter(y, y[:, :2], 1, 0, 2) + torch.slice_scatter(y, y[:, 2:], 1, 2, 5),
    "padded": lambda y: F.pad(y.exp(), (0, 0, 1, 0))[:, :5],
}
"""Divisors that need not be zero there as far as is known, and need not differ from it."""

SAFE: dict[str, Callable[[Tensor], Tensor]] = {
    "an epsilon": lambda y: y.norm(dim=1, keepdim=True) + 1e-6,
    "a running sum and a number": lambda y: y.abs().cumsum(1) + 0.1,
    "at least a number": lambda y: y.abs().clamp_min(1e-6),
    "exponentials": lambda y: y.exp().sum(1, keepdim=True),
    "between zero and one": lambda y: y.sigmoid(),
    "softplus": lambda y: F.softplus(y),
    "a power of two": lambda y: torch.pow(2.0, y),
    "away from zero": lambda y: 2 + torch.sin(y),
    "one where it is zero": lambda y: torch.where(y == 0, 1.0, y),
    "root of a mean": lambda y: torch.sqrt(y.square().mean(1, keepdim=True) + 1e-5),
    "the other channels'": lambda y: y.square().sum(-1, keepdim=True),
}
"""Divisors that are not zero where the channel is."""


@pytest.mark.parametrize("name", ZERO)
def test_a_channel_is_not_divided_by_what_vanishes_with_it(name: str) -> None:
    assert sound(Scaled(ZERO[name]), (2, 5, 5), check=check_quickly).frozen["removed entries would be divided by"] == 1


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_channel_is_not_divided_by_what_may_vanish_with_it(name: str) -> None:
    assert (
        sound(Scaled(UNKNOWN[name]), (2, 5, 5), check=check_quickly).frozen["removed entries need not have a value"]
        == 1
    )


@pytest.mark.parametrize("name", SAFE)
def test_a_channel_can_go_that_is_divided_by_what_does_not_vanish_with_it(name: str) -> None:
    assert sound(Scaled(SAFE[name]), (2, 5, 5), check=check_quickly).prunable == 1


class Curved(nn.Module):
    """Channels through a function that has a value for some numbers only."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(5, 6), nn.Linear(6, 7), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


CURVES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "acosh from one": (lambda y: torch.acosh(y.square() + 1), True),
    "acosh below one": (lambda y: torch.acosh(y.abs() + 0.9), False),
    "polygamma": (lambda y: torch.polygamma(1, y), False),
    "powers that are numbers": (lambda y: torch.pow(y.abs() + 0.5, y), True),
    "powers of zero": (lambda y: torch.pow(y.abs(), y - 1), False),
    "zero times a logarithm of zero": (lambda y: torch.xlogy(y, y.abs()), True),
    "one times a logarithm of zero": (lambda y: torch.xlogy(y + 1, y.abs()), False),
    "a norm without an epsilon": (lambda y: F.rms_norm(y.mT, (5,), eps=0.0).mT, False),
    "what half precision makes of an epsilon": (lambda y: (y.half().abs() + 1e-9).reciprocal().double() * y, False),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_channel_can_go_where_its_function_has_a_value_at_zero(name: str) -> None:
    function, able = CURVES[name]
    assert sound(Curved(function), (2, 5, 5), check=check_quickly).prunable == able
