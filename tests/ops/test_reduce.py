"""Reductions: a sum does not miss zeros, a mean misses them by a known factor, the others are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import expect
from tests.ops.typed import typed


def test_a_sum_over_zeros_misses_nothing() -> None:
    expect(
        typed(lambda x: (x.sum(-1), x.sum((0, 1), keepdim=True), x.sum(), x.count_nonzero(1)), x=(5, 4, 3)),
        """
        x [a:5, b:4, c:3]
        -> [a:5, b:4]
        -> [1, 1, c:3]
        -> []
        -> [a:5, c:3]
        zero: a b, c, -, a c
        """,
    )


def test_a_sum_over_what_need_not_be_zero_is_held() -> None:
    expect(
        typed(lambda x: x.cos().sum(-1), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5]
        b: summed over where removed entries need not be zero at %sum_dim_int_list = aten.sum.dim_IntList
        """,
    )


def test_a_mean_can_be_rescaled() -> None:
    expect(
        typed(lambda x: (x.mean(-1), x.pow(2).mean(0, keepdim=True)), x=(5, 4, 3)),
        """
        x [a~:5, b:4, c~:3]
        -> [a~:5, b:4]
        -> [1, b:4, c~:3]
        zero: a b, b c
        a: a mean (RMS normalisation) runs over the axis at %mean_dim_1 = aten.mean.dim
        c: a mean (RMS normalisation) runs over the axis at %mean_dim = aten.mean.dim
        """,
    )


def test_norms_of_finite_order_are_sums() -> None:
    expect(
        typed(lambda x: (x.norm(dim=1), torch.linalg.norm(x, dim=1), torch.linalg.vector_norm(x)), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5]
        -> [a:5]
        -> []
        zero: a, a, -
        """,
    )


def test_other_norms_are_held() -> None:
    expect(
        typed(lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5]
        b: a norm of this order at %linalg_vector_norm_default = aten.linalg_vector_norm
        """,
    )
    expect(
        typed(lambda x: torch.linalg.norm(x, "nuc", dim=(0, 1)), x=(5, 4)),
        """
        x [a!:5, b!:4]
        -> []
        a b: no axis rule for aten.linalg_norm.ord_str at %linalg_norm_ord_str = aten.linalg_norm.ord_str
        """,
    )


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda x: x.amax(1), "an extreme is taken over the axis"),
        (lambda x: x.max(1), "an extreme is taken over the axis"),
        (lambda x: x.median(1), "an extreme is taken over the axis"),
        (lambda x: torch.aminmax(x, dim=1), "an extreme is taken over the axis"),
        (lambda x: (x > 0).any(1), "an extreme is taken over the axis"),
        (lambda x: x.argmax(1), "a reduction that sees zeros"),
        (lambda x: x.prod(1), "a reduction that sees zeros"),
        (lambda x: x.var(1), "a variance runs over the axis"),
        (lambda x: x.std(1, keepdim=True), "a variance runs over the axis"),
        (lambda x: torch.var_mean(x, 1), "a variance runs over the axis"),
        (lambda x: x.cumsum(1), "a running total along the axis"),
        (lambda x: x.cummax(1), "a running extreme along the axis"),
        (lambda x: x.diff(dim=1), "a difference along the axis"),
        (lambda x: x.logsumexp(1), "a log-sum-exp over the axis"),
        (lambda x: x.sort(1), "entries are ranked along the axis"),
        (lambda x: x.argsort(dim=1, stable=True), "entries are ranked along the axis"),
        (lambda x: x.topk(2, 1), "entries are ranked along the axis"),
    ],
)
def test_what_zeros_would_change_is_held(call: Callable[[Tensor], Any], word: str) -> None:
    text = typed(call, x=(5, 4, 3))
    assert text.startswith("x [a:5, b!:4, c:3]\n")
    assert f"b{' d' if 'd!:' in text else ''}: {word} at %" in text


def test_a_reduction_of_everything_holds_everything() -> None:
    expect(
        typed(lambda x: (x.max(), x.prod()), x=(5, 4)),
        """
        x [a!:5, b!:4]
        -> []
        -> []
        a b: a reduction that sees zeros at %max_default = aten.max
        """,
    )
