"""Verifying compares functions, in float64 whatever the weights are kept in, and loses no NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_backends.verify import precision
from shear_backends.verify.numbers import difference
from shear_backends.verify.precision import Fill, InPrecision
from tests.zoo import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_compared_in_float64_and_left_as_it_was(dtype: torch.dtype) -> None:
    model = build("llama_gqa").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = sir.plan(sir.trace(model), ratio=0.2)
    small = sir.shear(model, plan)
    seen: set[torch.dtype] = set()
    small.model.norm.register_forward_hook(lambda module, args, made: seen.add(made.dtype))
    report = sir.verify(model, small, plan)
    assert report.sound
    assert report.gap <= 1e-13 * report.scale
    # The norm asks for float32 by name, and is given float64.
    assert seen == {torch.float64}
    assert {p.dtype for p in small.parameters()} == {dtype}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_nan_is_never_sound() -> None:
    model = build("mlp")
    plan = sir.plan(sir.trace(model), ratio=0.2)
    small = sir.shear(model, plan)
    with torch.no_grad():
        small.down.bias[3] = math.nan
    report = sir.verify(model, small, plan)
    assert math.isnan(report.max_abs_diff)
    assert not report.sound


def test_equal_infinities_agree_and_nan_in_any_tensor_stays() -> None:
    inf, nan = torch.tensor([1.0, math.inf]), torch.tensor([math.nan])
    assert difference([inf], [inf.clone()]) == 0.0
    assert difference([inf], [-inf]) == math.inf
    assert math.isnan(difference([inf, nan], [inf, nan]))


@pytest.mark.parametrize("fills", [[], [Fill(0, torch.tensor([1, 4]))], [Fill(1, torch.tensor([0, 2]), -1.0)]])
@pytest.mark.parametrize("nudged", [False, True])
def test_a_matrix_that_is_converted_in_parts_reads_as_the_whole(
    fills: list[Fill], nudged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up, multiplied with and without a bias, and used otherwise than by a product."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(9, 5), "head": nn.Linear(5, 9)}).bfloat16()
    model["head"].weight = model["table"].weight
    weight, bias = model["head"].weight, model["head"].bias
    tokens = torch.tensor([[4, 1, 8], [4, 0, 1]])
    masks, steps = {id(weight): fills}, {id(weight): 0.1} if nudged else {}

    def asked() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), InPrecision(torch.float64, model, masks, None, steps):
            found = model["table"](tokens)
            rows = found.flatten(0, 1)
            return found, rows @ weight.t(), nn.functional.linear(rows, weight, bias), weight.t() + 1

    whole = asked()
    monkeypatch.setattr(precision, "_AT_ONCE", 7)
    for part, expected in zip(asked(), whole, strict=True):
        assert part.dtype is torch.float64
        torch.testing.assert_close(part, expected, rtol=1e-14, atol=1e-14)
