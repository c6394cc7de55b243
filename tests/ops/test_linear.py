"""Products of matrices: what is summed over has the same axis on both sides, what is not comes out."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401  # registers the operator of its experts
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_linear_has_the_rows_of_its_weight() -> None:
    expect(
        typed(lambda x, w, b: F.linear(x, w, b), x=(5, 7, 4), w=(3, 4), b=(3,)),
        """
        x [a:5, b:7, c:4]
        w [d:3, c:4]
        b [d:3]
        -> [a:5, b:7, d:3]
        zero: d
        """,
    )


def test_linear_with_a_bias_that_is_not_zero_there_makes_no_zeros() -> None:
    expect(
        typed(lambda x, w, b: F.linear(x, w, b.exp()), x=(5, 4), w=(3, 4), b=(3,)),
        """
        x [a:5, b:4]
        w [c:3, b:4]
        b [c:3]
        -> [a:5, c:3]
        """,
    )


def test_matrix_product() -> None:
    expect(
        typed(lambda a, b: a @ b, a=(5, 4), b=(4, 3)),
        """
        a [a:5, b:4]
        b [b:4, c:3]
        -> [a:5, c:3]
        zero: a c
        """,
    )


def test_batches_of_matrices_broadcast() -> None:
    expect(
        typed(lambda a, b: torch.matmul(a, b), a=(2, 1, 5, 4), b=(3, 4, 7)),
        """
        a [a:2, 1, b:5, c:4]
        b [d:3, c:4, e:7]
        -> [a:2, d:3, b:5, e:7]
        zero: a b d e
        """,
    )


def test_a_vector_has_no_rows() -> None:
    expect(
        typed(lambda a, b, c: (a @ b, b @ c, a @ a), a=(4,), b=(4, 3), c=(3,)),
        """
        a [a:4]
        b [a:4, b:3]
        c [b:3]
        -> [b:3]
        -> [a:4]
        -> []
        zero: b, a, -
        """,
    )


def test_conv1d_of_gpt2_is_addmm() -> None:
    expect(
        typed(lambda x, w, b: torch.addmm(b, x.view(-1, 4), w), x=(5, 2, 4), w=(4, 3), b=(3,)),
        """
        x [a:5, b:2, c:4]
        w [c:4, d:3]
        b [d:3]
        -> [a:5 * b:2, d:3]
        zero: d
        """,
    )


def test_baddbmm_adds_a_bias_that_broadcasts() -> None:
    expect(
        typed(lambda x, a, b: torch.baddbmm(x, a, b), x=(2, 1, 7), a=(2, 5, 4), b=(2, 4, 7)),
        """
        x [a:2, 1, b:7]
        a [a:2, c:5, d:4]
        b [a:2, d:4, b:7]
        -> [a:2, c:5, b:7]
        zero: a b
        """,
    )


def test_a_product_over_what_need_not_be_zero_holds_its_axis() -> None:
    expect(
        typed(lambda a, b: a.exp() @ b.exp(), a=(5, 4), b=(4, 3)),
        """
        a [a:5, b!:4]
        b [b!:4, c:3]
        -> [a:5, c:3]
        b: summed over where removed entries need not be zero at %matmul_default = aten.matmul
        """,
    )


def test_einsum_has_an_axis_per_letter() -> None:
    expect(
        typed(lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k), q=(2, 5, 3, 4), k=(2, 7, 3, 4)),
        """
        q [a:2, b:5, c:3, d:4]
        k [a:2, e:7, c:3, d:4]
        -> [a:2, c:3, b:5, e:7]
        zero: a b c e
        """,
    )


def test_einsum_with_an_ellipsis_broadcasts() -> None:
    expect(
        typed(lambda x, w: torch.einsum("...i,oi->...o", x, w), x=(5, 7, 4), w=(3, 4)),
        """
        x [a:5, b:7, c:4]
        w [d:3, c:4]
        -> [a:5, b:7, d:3]
        zero: a b d
        """,
    )


def test_einsum_without_an_arrow_sorts_its_letters() -> None:
    expect(
        typed(lambda a, b: torch.einsum("ki,kj", a, b), a=(4, 5), b=(4, 3)),
        """
        a [a:4, b:5]
        b [a:4, c:3]
        -> [b:5, c:3]
        zero: b c
        """,
    )


def test_einsum_over_three_tensors() -> None:
    expect(
        typed(lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c), a=(5, 4), b=(4, 3), c=(3, 7)),
        """
        a [a:5, b:4]
        b [b:4, c:3]
        c [c:3, d:7]
        -> [a:5, d:7]
        zero: a d
        """,
    )


def test_a_diagonal_in_einsum_is_not_followed() -> None:
    expect(
        typed(lambda a: torch.einsum("ii->i", a), a=(4, 4)),
        """
        a [a!:4, b!:4]
        -> [c!:4]
        a b c: a diagonal in einsum at %einsum_default = aten.einsum
        """,
    )


def test_outer_and_inner_products() -> None:
    expect(
        typed(lambda a, b, c: (torch.outer(a, b), torch.inner(c, b)), a=(5,), b=(4,), c=(3, 4)),
        """
        a [a:5]
        b [b:4]
        c [c:3, b:4]
        -> [a:5, b:4]
        -> [c:3]
        zero: a b, c
        """,
    )


def test_tensordot_sums_over_pairs_of_dims() -> None:
    expect(
        typed(lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])), a=(5, 4, 3), b=(4, 3, 7)),
        """
        a [a:5, b:4, c:3]
        b [b:4, c:3, d:7]
        -> [a:5, d:7]
        zero: a d
        """,
    )


def test_addmv_adds_a_vector() -> None:
    expect(
        typed(lambda x, a, b: torch.addmv(x, a, b), x=(5,), a=(5, 4), b=(4,)),
        """
        x [a:5]
        a [a:5, b:4]
        b [b:4]
        -> [a:5]
        zero: a
        """,
    )


def test_grouped_products_follow_the_columns_of_every_expert() -> None:
    offsets = torch.tensor([2, 5], dtype=torch.int32)
    call = torch.ops.transformers.grouped_mm_fallback
    expect(
        typed(lambda x, w, offs: call(x, w, offs), x=(5, 8), w=(2, 8, 4), offs=offsets),
        """
        x    [a!:5, b:8]
        w    [c!:2, b:8, d:4]
        offs [c!:2]
        ->   [a!:5, d:4]
        zero: a d
        a c: experts are chosen by value at %grouped_mm_fallback_default = transformers.grouped_mm_fallback
        """,
    )


def test_a_square_product_binds_rows_and_columns_to_one_axis() -> None:
    """Weight times its own transpose: both sides are the same rows."""
    expect(
        typed(lambda w: w @ w.T, w=(5, 4)),
        """
        w [a:5, b:4]
        -> [a:5, a:5]
        """,
    )


def test_bilinear_sums_over_both_inputs() -> None:
    expect(
        typed(torch.nn.functional.bilinear, input1=(7, 4), input2=(7, 5), weight=(3, 4, 5), bias=(3,)),
        """
        input1 [a:7, b:4]
        input2 [a:7, c:5]
        weight [d:3, b:4, c:5]
        bias   [d:3]
        ->     [a:7, d:3]
        zero: d
        """,
    )


def test_products_that_are_added_up() -> None:
    expect(
        typed(lambda x, y, z: torch.addbmm(x, y, z), x=(5, 4), y=(3, 5, 2), z=(3, 2, 4)),
        """
        x [a:5, b:4]
        y [c:3, a:5, d:2]
        z [c:3, d:2, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )
    expect(
        typed(lambda x, y, z: torch.addr(x, y, z), x=(5, 4), y=(5,), z=(4,)),
        """
        x [a:5, b:4]
        y [a:5]
        z [b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )
    expect(
        typed(lambda x, y: torch.linalg.vecdot(x, y, dim=1), x=(5, 4, 3), y=(4, 3)),
        """
        x [a:5, b:4, c:3]
        y [b:4, c:3]
        -> [a:5, c:3]
        zero: a c
        """,
    )
