"""Composed operators: what follows the base, what is an adapter's own."""

from __future__ import annotations

import torch

from tests.golden import expect
from tests.ops.typed import typed

lora = torch.ops.lora


def test_b_follows_the_rows_and_a_the_columns_of_the_base() -> None:
    expect(
        typed(lambda x, w, b, p, q: lora.linear(x, w, b, A=[p], B=[q], scale=[0.5]), x=(3, 5), w=(7, 5), b=(7,),
              p=(2, 5), q=(7, 2)),
        """
        x [a:3, b:5]
        w [c:7, b:5]
        b [c:7]
        p [d:2, b:5]
        q [c:7, d:2]
        -> [a:3, c:7]
        zero: c
        """,
    )  # fmt: skip


def test_two_adapters_have_a_rank_each_and_a_bias_of_b_follows_the_rows() -> None:
    expect(
        typed(
            lambda x, w, p, q, r, s, t: lora.linear(x, w, A=[p, r], B=[q, s], scale=[0.5, 2.0], B_bias=[None, t]),
            x=(3, 5), w=(7, 5), p=(2, 5), q=(7, 2), r=(4, 5), s=(7, 4), t=(7,),
        ),
        """
        x [a:3, b:5]
        w [c:7, b:5]
        p [d:2, b:5]
        q [c:7, d:2]
        r [e:4, b:5]
        s [c:7, e:4]
        t [c:7]
        -> [a:3, c:7]
        zero: c
        """,
    )  # fmt: skip


def test_a_transposed_base_has_its_columns_first() -> None:
    expect(
        typed(lambda x, w, p, q: lora.linear(x, w, A=[p], B=[q], scale=[0.5], transposed=True), x=(3, 5), w=(5, 7),
              p=(2, 5), q=(7, 2)),
        """
        x [a:3, b:5]
        w [b:5, c:7]
        p [d:2, b:5]
        q [c:7, d:2]
        -> [a:3, c:7]
        zero: a c
        """,
    )  # fmt: skip


def test_a_magnitude_follows_the_rows_and_its_norms_sum_over_the_columns() -> None:
    expect(
        typed(lambda x, w, b, p, q, m: lora.linear(x, w, b, A=[p], B=[q], scale=[0.5], magnitude=[m]), x=(3, 5),
              w=(7, 5), b=(7,), p=(2, 5), q=(7, 2), m=(7,)),
        """
        x [a:3, b:5]
        w [c:7, b:5]
        b [c:7]
        p [d:2, b:5]
        q [c:7, d:2]
        m [c:7]
        -> [a:3, c:7]
        zero: c
        """,
    )  # fmt: skip


def test_columns_that_are_not_zero_in_the_base_are_held_by_its_norms() -> None:
    expect(
        typed(lambda x, w, p, q, m: lora.linear(x, w.cos(), A=[p], B=[q], scale=[0.5], magnitude=[m]), x=(3, 5),
              w=(7, 5), p=(2, 5), q=(7, 2), m=(7,)),
        """
        x [a:3, b!:5]
        w [c:7, b!:5]
        p [d:2, b!:5]
        q [c:7, d:2]
        m [c:7]
        -> [a:3, c:7]
        zero: a
        b: summed over where removed entries need not be zero at %linear_default = lora.linear
        """,
    )  # fmt: skip


def test_rows_that_an_adapter_makes_from_nothing_are_not_zero() -> None:
    expect(
        typed(lambda x, w, p, q: lora.linear(x, w, A=[p], B=[q.cos()], scale=[0.5]), x=(3, 5), w=(7, 5), p=(2, 5),
              q=(7, 2)),
        """
        x [a:3, b:5]
        w [c:7, b:5]
        p [d!:2, b:5]
        q [c:7, d!:2]
        -> [a:3, c:7]
        zero: a
        d: summed over where removed entries need not be zero at %linear_default = lora.linear
        """,
    )  # fmt: skip


def test_an_embedding_is_looked_up_in_base_and_adapter_by_the_same_values() -> None:
    rows = torch.tensor([[0, 4, 2]])
    expect(
        typed(lambda i, w, p, q, m: lora.embedding(w, i, A=[p], B=[q], scale=[0.5], magnitude=[m]), i=rows, w=(5, 7),
              p=(2, 5), q=(7, 2), m=(7,)),
        """
        i [1, a:3]
        w [b!:5, c:7]
        p [d:2, b!:5]
        q [c:7, d:2]
        m [c:7]
        -> [1, a:3, c:7]
        zero: c
        b: rows are chosen by the values of the input at %embedding_default = lora.embedding
        """,
    )  # fmt: skip


def test_a_convolution_has_one_kernel_for_base_and_a() -> None:
    expect(
        typed(
            lambda x, w, b, p, q, m: lora.conv(
                x, w, b, [1, 1], [1, 1], [1, 1], A=[p], B=[q], scale=[0.5], magnitude=[m]
            ),
            x=(2, 5, 8, 9), w=(7, 5, 3, 3), b=(7,), p=(4, 5, 3, 3), q=(7, 4, 1, 1), m=(1, 7, 1, 1),
        ),
        """
        x [a:2, b:5, c!:8, d!:9]
        w [e:7, b:5, f!:3, g!:3]
        b [e:7]
        p [h:4, b:5, f!:3, g!:3]
        q [e:7, h:4, 1, 1]
        m [1, e:7, 1, 1]
        -> [a:2, e:7, i!:8, j!:9]
        zero: e
        c d i j: positions of a convolution at %conv_default = lora.conv
        f g: kernel positions at %conv_default = lora.conv
        """,
    )  # fmt: skip


def test_stacked_adapters_count_their_base_s_experts_beside_their_rank() -> None:
    expect(
        typed(lambda w, p, q: lora.experts(w, A=[p], B=[q], scale=[0.5]), w=(3, 7, 5), p=(6, 5), q=(7, 6)),
        """
        w [a:3, b:7, c:5]
        p [a:3 * d:2, c:5]
        q [b:7, d:2 * a:3]
        -> [a:3, b:7, c:5]
        zero: a b c
        """,
    )


def test_turned_experts_have_their_columns_before_their_rows() -> None:
    expect(
        typed(lambda w, p, q: lora.experts(w, A=[p], B=[q], scale=[0.5], transposed=True), w=(3, 5, 7), p=(6, 5),
              q=(7, 6)),
        """
        w [a:3, b:5, c:7]
        p [a:3 * d:2, b:5]
        q [c:7, d:2 * a:3]
        -> [a:3, b:5, c:7]
        zero: a b c
        """,
    )  # fmt: skip
