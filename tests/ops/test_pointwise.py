"""Elementwise operators: dims broadcast; zeros stay where each operator leaves them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_dims_broadcast_from_the_right() -> None:
    expect(
        typed(lambda x, y, z: x + y * z, x=(5, 1, 3), y=(4, 1), z=(1,)),
        """
        x [a:5, 1, b:3]
        y [c:4, 1]
        z [1]
        -> [a:5, c:4, b:3]
        """,
    )


@pytest.mark.parametrize("call", [torch.mul, torch.multiply, torch.Tensor.mul_])
def test_a_product_is_zero_where_one_factor_is(call: Callable[..., Tensor]) -> None:
    expect(
        typed(lambda x, y: call(x.clone(), y), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


@pytest.mark.parametrize("call", [torch.add, torch.sub, torch.maximum, torch.fmin])
def test_a_sum_is_zero_where_both_terms_are(call: Callable[..., Tensor]) -> None:
    expect(
        typed(lambda x, y: call(x, y), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        zero: b
        """,
    )


def test_a_sum_with_a_number_is_not_zero() -> None:
    expect(
        typed(lambda x: (x + 1, 1 - x, x + 0.0), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        zero: -, -, a b
        """,
    )


def test_a_quotient_is_zero_where_its_dividend_is() -> None:
    expect(
        typed(lambda x, y: x / y.exp(), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


@pytest.mark.parametrize("call", [torch.div, torch.fmod, torch.floor_divide, torch.remainder])
def test_a_divisor_must_not_vanish(call: Callable[..., Tensor]) -> None:
    name = {torch.div: "div"}.get(call, call.__name__)
    text = typed(lambda x, y: call(x, y), x=(5, 4), y=(4,))
    expect(
        text.partition(f" at %{name}")[0],
        """
        x [a:5, b!:4]
        y [b!:4]
        -> [a:5, b!:4]
        zero: a b
        b: removed entries would be divided by
        """,
    )


@pytest.mark.parametrize("call", [torch.log, torch.rsqrt, torch.reciprocal, lambda x: x.pow(-0.5)])
def test_a_function_with_a_pole_at_zero_holds_what_vanishes(call: Callable[..., Tensor]) -> None:
    expect(
        typed(lambda x: call(x.abs()), x=(5, 4)).partition(" at %")[0],
        """
        x [a!:5, b!:4]
        -> [a!:5, b!:4]
        a b: removed entries would be divided by
        """,
    )
    expect(
        typed(lambda x: call(x.abs() + 1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        """,
    )


@pytest.mark.parametrize(
    "call", [torch.relu, F.gelu, F.silu, torch.tanh, F.hardswish, F.relu6, F.mish, F.celu, torch.abs]
)
def test_a_function_that_is_zero_at_zero_keeps_zeros(call: Callable[..., Tensor]) -> None:
    expect(
        typed(lambda x: call(x), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


@pytest.mark.parametrize("call", [torch.sigmoid, torch.exp, torch.cos, F.softplus, F.hardsigmoid, torch.logical_not])
def test_other_functions_lose_them(call: Callable[..., Tensor]) -> None:
    expect(
        typed(lambda x: call(x), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        """,
    )


@pytest.mark.parametrize("call", [F.relu, F.silu, F.hardswish, F.elu, F.mish, F.relu6, F.leaky_relu])
def test_in_place_is_the_same_function(call: Callable[..., Tensor]) -> None:
    expect(
        typed(lambda x: call(x.clone(), inplace=True), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


def test_powers() -> None:
    expect(
        typed(lambda x: (x.pow(2), x.pow(0), 2**x), x=(5, 4)).partition(" at %")[0],
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        zero: a b, -, -
        """,
    )


def test_clamping_keeps_zeros_between_its_bounds() -> None:
    expect(
        typed(
            lambda x: (x.clamp(-1, 1), x.clamp(min=0), x.clamp(min=0.5), F.hardtanh(x), F.hardtanh(x, 1, 2)), x=(5, 4)
        ),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        zero: a b, a b, -, a b, -
        """,
    )


def test_clamping_by_a_tensor_broadcasts() -> None:
    expect(
        typed(lambda x, y: x.clamp(y), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        """,
    )


def test_where_and_masks_lose_zeros() -> None:
    expect(
        typed(lambda x, y: (torch.where(y > 0, x, y), x.masked_fill(y > 0, 1.0)), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        """,
    )


def test_comparisons_are_elementwise() -> None:
    expect(
        typed(lambda x, y: (x > y) & (x < 1) | (y == 0), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        """,
    )


def test_prelu_has_its_slopes_on_dim_one() -> None:
    """Not on the last dim, where broadcasting would put them."""
    expect(
        typed(lambda x, w: F.prelu(x, w), x=(5, 4, 4), w=(4,)),
        """
        x [a:5, b:4, c:4]
        w [b:4]
        -> [a:5, b:4, c:4]
        zero: a b c
        """,
    )
    expect(
        typed(lambda x, w: F.prelu(x, w), x=(5, 4), w=(1,)),
        """
        x [a:5, b:4]
        w [1]
        -> [a:5, b:4]
        zero: a b
        """,
    )


def test_glu_halves_lose_the_same_indices() -> None:
    expect(
        typed(lambda x: F.glu(x, -1), x=(5, 8)),
        """
        x [a:5, (b:4 | b:4)]
        -> [a:5, b:4]
        zero: a b
        """,
    )


def test_gate_and_up_in_one_projection() -> None:
    def gated(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, both).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    expect(
        typed(gated, x=(3, 5), both=(14, 5), down=(5, 7)),
        """
        x    [a:3, b:5]
        both [(c:7 | c:7), b:5]
        down [d:5, c:7]
        ->   [a:3, d:5]
        zero: a d
        """,
    )
