"""Functions of matrices and Fourier transforms hold what they run over, and nothing else."""

from __future__ import annotations

import torch

from tests.golden import expect
from tests.ops.typed import typed


def test_matrices_are_held_and_counted() -> None:
    expect(
        typed(lambda x: (torch.linalg.svd(x)[1], torch.det(x), torch.matrix_exp(x)), x=(3, 4, 4)),
        """
        x [a:3, b!:4, c!:4]
        -> [a:3, d!:4]
        -> [a:3]
        -> [a:3, e!:4, f!:4]
        b c d: every entry of a matrix counts at %linalg_svd_default = aten.linalg_svd
        e f: every entry of a matrix counts at %matrix_exp_default = aten.matrix_exp
        """,
    )


def test_a_matrix_of_zeros_has_no_inverse() -> None:
    expect(
        typed(torch.linalg.inv, A=(3, 4, 4)),
        """
        A [a!:3, b!:4, c!:4]
        -> [a!:3, d!:4, e!:4]
        a: a matrix of zeros has no such value at %linalg_inv_default = aten.linalg_inv
        b c d e: every entry of a matrix counts at %linalg_inv_default = aten.linalg_inv
        """,
    )


def test_a_transform_along_one_dim_leaves_the_others() -> None:
    expect(
        typed(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1), x=(3, 5, 4)),
        """
        x [a:3, b!:5, c:4]
        -> [a:3, d!:5, c:4]
        zero: a c
        b: a Fourier transform runs over the axis at %fft_rfft_default = aten.fft_rfft
        d: a Fourier transform runs over the axis at %fft_irfft_default = aten.fft_irfft
        """,
    )


def test_a_transform_over_tokens_and_features_holds_both() -> None:
    expect(
        typed(lambda x: torch.fft.fftn(x, dim=(1, 2)).real, x=(3, 5, 4)),
        """
        x [a:3, b!:5, c!:4]
        -> [a:3, d!:5, e!:4]
        zero: a
        b c d e: a Fourier transform runs over the axis at %fft_fftn_default = aten.fft_fftn
        """,
    )
