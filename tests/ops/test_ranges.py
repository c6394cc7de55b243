"""Bounds of results, and where operators have a value: numbers drawn between the bounds of operands stay within."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from shear_passes.ops.domain import bounds, conditional, has_value
from shear_passes.ops.ranges import ANY, Range, value
from shear_passes.ops.traits import known_rows, row_name

aten = torch.ops.aten

BINARY = [
    aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default,
    aten.minimum.default, aten.fmax.default, aten.fmin.default, aten.pow.Tensor_Tensor,
]  # fmt: skip
UNARY = [
    aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.sqrt.default, aten.exp.default, aten.exp2.default,
    aten.expm1.default, aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default,
    aten.softplus.default, aten.erf.default, aten.atan.default, aten.asinh.default, aten.sinh.default,
    aten.relu6.default, aten.hardsigmoid.default, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.trunc.default, aten.erfinv.default, aten.asin.default, aten.atanh.default, aten.acosh.default,
    aten.logit.default, aten.neg.default, aten.abs.default, aten.sin.default, aten.cos.default, aten.square.default,
    aten.reciprocal.default, aten.rsqrt.default, aten.cosh.default,
]  # fmt: skip
WITH_NUMBERS = [
    (aten.clamp.default, -0.5, 1.5), (aten.clamp_min.default, 0.25), (aten.softplus.default, -2.0),
    (aten.pow.Tensor_Scalar, 2), (aten.pow.Tensor_Scalar, 3), (aten.pow.Tensor_Scalar, -2), (aten.mul.Tensor, -1.5),
    (aten.pow.Tensor_Scalar, 0.5), (aten.pow.Tensor_Scalar, -0.5), (aten.pow.Tensor_Scalar, 0), (aten.add.Tensor, 2.0),
    (aten.div.Tensor, -0.5),
]  # fmt: skip

ENDS = st.sampled_from([-math.inf, -7.0, -2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 3.0, 8.0, math.inf])
RANGES = st.builds(lambda a, b, zero: Range(min(a, b), max(a, b), zero), ENDS, ENDS, st.booleans()).filter(
    lambda r: r != Range(0, 0, zero=False) and not (r.single and math.isinf(r.low))
)


def call(op: Any, operands: int, *numbers: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(op, (*(graph.placeholder(f"x{i}") for i in range(operands)), *numbers))


def drawn(data: st.DataObject, within: Range) -> float:
    """A number of the range, its bounds and zero more often than others; none so small that its square is zero."""
    low, high = max(within.low, -20.0), min(within.high, 20.0)
    number = data.draw(st.sampled_from([low, high, 0.0]) | st.floats(low, high))
    number = min(max(round(number, 3), low), high)
    return number if number or within.zero else high / 4 or low / 4


CALLS = [(op, 1) for op in UNARY] + [(op, 2) for op in BINARY] + [(op, 1, *rest) for op, *rest in WITH_NUMBERS]


@pytest.mark.parametrize("call_of", CALLS, ids=lambda c: "-".join(map(str, c)))
@settings(max_examples=60)
@given(data=st.data())
def test_numbers_within_bounds_have_results_within_bounds(call_of: tuple[Any, ...], data: st.DataObject) -> None:
    node = call(*call_of)
    known = {operand: data.draw(RANGES) for operand in node.all_input_nodes}
    found = bounds(node, known)
    defined = not conditional(node) or has_value(node, known)
    made = value(node, {operand: drawn(data, within) for operand, within in known.items()})
    if defined:
        assert math.isfinite(made)
        slack = 1e-9 * max(1.0, abs(made))
        assert found.low - slack <= made <= found.high + slack
        assert made or found.zero


def test_every_operator_with_bounds_is_tried() -> None:
    aliases = {"multiply", "divide", "true_divide", "subtract", "float_power", "negative", "absolute", "clip",
               "clamp_max", "hardtanh", "where", "masked_fill", "softsign"}  # fmt: skip
    bounded = {name for name, row in known_rows().items() if row.bounds is not None and "." not in name}
    assert {row_name(call(*c).target) for c in CALLS} == bounded - aliases


@pytest.mark.parametrize(
    ("op", "numbers", "operand", "able"),
    [
        (aten.log.default, (), Range(0, 1, zero=False), True),
        (aten.log.default, (), Range(0, 1), False),
        (aten.reciprocal.default, (), Range(-1, 1, zero=False), True),
        (aten.acosh.default, (), Range(1, math.inf), True),
        (aten.acosh.default, (), Range(0, math.inf), False),
        (aten.polygamma.default, None, Range(2, 2), True),
        (aten.polygamma.default, None, Range(2, 3), False),
        (aten.lgamma.default, (), Range(0, 0), False),
        (aten.pow.Tensor_Scalar, (-0.5,), Range(0.5, 2), True),
        (aten.pow.Tensor_Scalar, (-0.5,), Range(-0.5, 2, zero=False), False),
        (aten.pow.Tensor_Scalar, (-2,), ANY, False),
    ],
)
def test_where_a_function_has_a_value(op: Any, numbers: tuple[Any, ...] | None, operand: Range, able: bool) -> None:
    node = call(op, 1, *(numbers or ()))
    if numbers is None:
        node.args = (1, *node.args)
    assert has_value(node, dict.fromkeys(node.all_input_nodes, operand)) == able


@pytest.mark.parametrize("function", [lambda r: r.many(), lambda r: r | Range(2, 3), lambda r: r.size()])
def test_what_may_be_zero_stays_so(function: Callable[[Range], Range]) -> None:
    assert function(Range(0, 1)).zero
    assert not function(Range(0, 1, zero=False)).zero


def test_half_precision_makes_zero_of_what_is_too_small() -> None:
    assert Range(1e-9, 1).held(torch.float16).zero
    assert not Range(1e-9, 1).held(torch.bfloat16).zero
