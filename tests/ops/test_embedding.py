"""Table look-up."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_rows_are_chosen_by_value_and_columns_follow() -> None:
    expect(
        typed(lambda w, ids: F.embedding(ids, w), w=(6, 4), ids=torch.tensor([[0, 5, 2]])),
        """
        w   [a!:6, b:4]
        ids [1, c:3]
        ->  [1, c:3, b:4]
        zero: b
        a: rows are chosen by the values of the input at %embedding_default = aten.embedding
        """,
    )


def test_tied_with_the_head_the_rows_are_held_once() -> None:
    expect(
        typed(lambda w, ids: F.embedding(ids, w) @ w.T, w=(6, 4), ids=torch.tensor([[0, 5, 2]])),
        """
        w   [a!:6, b:4]
        ids [1, c:3]
        ->  [1, c:3, a!:6]
        zero: a
        a: rows are chosen by the values of the input at %embedding_default = aten.embedding
        """,
    )


BAGS = {"w": (6, 4), "ids": torch.tensor([0, 5, 2, 3, 1]), "starts": torch.tensor([0, 2, 4])}


def test_columns_of_a_table_go_through_bags_of_its_rows() -> None:
    expect(
        typed(lambda w, ids, starts: F.embedding_bag(ids, w, starts, mode="mean"), **BAGS),
        """
        w      [a!:6, b:4]
        ids    [c!:5]
        starts [d!:3]
        ->     [e!:3, b:4]
        a c d e: rows are chosen by the values of the input at %embedding_bag_padding_idx = aten.embedding_bag.padding_idx
        """,
    )


def test_the_largest_of_a_bag_is_taken_for_each_column() -> None:
    expect(
        typed(lambda w, ids, starts: F.embedding_bag(ids, w, starts, mode="max"), **BAGS),
        """
        w      [a!:6, b:4]
        ids    [c!:5]
        starts [d!:3]
        ->     [e!:3, b:4]
        a c d e: rows are chosen by the values of the input at %embedding_bag_padding_idx = aten.embedding_bag.padding_idx
        """,
    )
