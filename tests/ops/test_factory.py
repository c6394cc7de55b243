"""Tensors made from sizes: their axes are those of what they meet."""

from __future__ import annotations

import torch

from tests.golden import expect
from tests.ops.typed import typed


def test_a_fill_takes_the_axes_of_what_it_meets() -> None:
    expect(
        typed(lambda x: x * torch.full((4,), 2.0) + torch.zeros(5, 1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a
        """,
    )


def test_ones_are_not_zero_where_units_were_removed() -> None:
    expect(
        typed(lambda x: (x + torch.ones(4)) @ torch.ones(4, 3), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5, c:3]
        b: summed over where removed entries need not be zero at %matmul_default = aten.matmul
        """,
    )


def test_a_sequence_keeps_the_entries_of_the_kept_indices() -> None:
    expect(
        typed(lambda x: x * torch.arange(1, 5) + torch.linspace(0, 1, 4), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        """,
    )


def test_fills_like_another_tensor() -> None:
    expect(
        typed(lambda x: (torch.zeros_like(x), x.new_ones(4, 3), torch.full_like(x, 2.0)), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        -> [c:4, d:3]
        -> [a:5, b:4]
        zero: a b, -, -
        """,
    )


def test_a_fill_in_place_is_no_longer_what_it_was() -> None:
    expect(
        typed(lambda x: x.clone().fill_(1.0), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        """,
    )


def test_a_number() -> None:
    expect(
        typed(lambda x: x * torch.scalar_tensor(2.0), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


def test_an_identity_matrix_holds_its_rows_and_columns() -> None:
    expect(
        typed(lambda x: x @ torch.eye(4), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5, c!:4]
        zero: a
        b c: entries that depend on the whole shape at %eye_default = aten.eye
        """,
    )


def test_random_numbers_hold_their_axes() -> None:
    expect(
        typed(lambda x: (x + torch.rand(4), torch.rand_like(x)), x=(5, 4), rounds=0),
        """
        x [a!:5, b!:4]
        -> [a!:5, b!:4]
        -> [a!:5, b!:4]
        a: random numbers are drawn in order at %rand_like_default = aten.rand_like
        b: entries that depend on the whole shape at %rand_default = aten.rand
        """,
    )


def test_a_constant_in_the_code_is_not_masked() -> None:
    """Its entries at removed indices stay what they are: a sum over them needs a zero from the other side."""
    expect(
        typed(lambda x: x.cos() @ torch.tensor([1.0, 2.0, 3.0, 4.0]), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5]
        b: summed over where removed entries need not be zero at %matmul_default = aten.matmul
        """,
    )
    expect(
        typed(lambda x, c: x.cos() @ c, x=(5, 4), c=torch.tensor([1.0, 2.0, 3.0, 4.0])),
        """
        x [a:5, b:4]
        c [b:4]
        -> [a:5]
        """,
    )


def test_a_fill_by_a_number_in_a_tensor_is_a_fill() -> None:
    expect(
        typed(lambda x, value: x.clone().fill_(value), x=(5, 4), value=()),
        """
        x     [a:5, b:4]
        value []
        ->    [a:5, b:4]
        """,
    )
