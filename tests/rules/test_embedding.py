"""Table look-up."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.golden import expect
from tests.rules.typed import typed


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
