"""Functions of whole matrices and transforms along a dim: what they run over is held, all other dims pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shear_ir.axes import Dim, Dims
from shear_passes.ops.registry import Results, Site, Vanish, rule, wrap

aten = torch.ops.aten


@rule(
    aten.linalg_pinv.default, aten.linalg_pinv.atol_rtol_float, aten.linalg_svd.default, aten._linalg_svd.default,
    aten.linalg_svdvals.default, aten.linalg_eigh.default, aten._linalg_eigh.default, aten.linalg_eigvalsh.default,
    aten.matrix_exp.default, aten.linalg_matrix_exp.default, aten.det.default, aten.linalg_det.default,
    aten._linalg_det.default, aten.linalg_matrix_norm.default, aten.linalg_matrix_norm.str_ord,
)  # fmt: skip
def of_matrices(site: Site, x: Dims, *_: Any, **options: Any) -> Dims | Results:
    """Every entry of a result depends on all entries of a matrix; leading dims count matrices."""
    if options.get("dim") is not None:
        return site.barrier("matrices in other dims than the last")
    return _of_each(site, x)


@rule(
    aten.linalg_inv.default, aten.linalg_inv_ex.default, aten.inverse.default, aten.linalg_cholesky.default,
    aten.linalg_cholesky_ex.default, aten.linalg_qr.default, aten.logdet.default, aten.linalg_slogdet.default,
    aten._linalg_slogdet.default,
)  # fmt: skip
def of_regular_matrices(site: Site, x: Dims, *_: Any, **__: Any) -> Dims | Results:
    """The same, of matrices that are not zero: those that are counted cannot go either."""
    site.freeze(x[:-2], "a matrix of zeros has no such value")
    return _of_each(site, x)


def _of_each(site: Site, x: Dims) -> Dims | Results:
    lead = x[:-2]
    site.freeze(x[-2:], "every entry of a matrix counts")
    results: Results = []
    for shape in site.shapes:
        own = site.fresh(shape[len(lead) :])
        site.freeze(own, "every entry of a matrix counts")
        results.append((*lead, *own))
    return results if len(results) > 1 else results[0]


@rule(
    aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default, aten.fft_hfft.default,
    aten.fft_ihfft.default, vanish=Vanish.FIRST,
)  # fmt: skip
def transform(site: Site, x: Dims, length: int | None = None, dim: int = -1, *_: Any) -> Dims:
    """A Fourier transform along one dim, of each of its other entries alone; of zeros it is zero."""
    return _transformed(site, x, [dim])


@rule(
    aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default,
    aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default, aten.fft_irfftn.default,
    vanish=Vanish.FIRST,
)  # fmt: skip
def transform_of_several(site: Site, x: Dims, sizes: Any = None, dims: Sequence[int] | None = None, *_: Any) -> Dims:
    """The same along several dims: the last two, or as many as sizes are given, or all."""
    name = site.node.target.__name__  # type: ignore[union-attr]
    last = 2 if "2" in name else len(sizes) if sizes is not None else len(x)
    return _transformed(site, x, range(-last, 0) if dims is None else dims)


@rule(aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default, vanish=Vanish.FIRST)
def plain_transform(site: Site, x: Dims, dims: Sequence[int], *_: Any) -> Dims:
    """What those are made of."""
    return _transformed(site, x, dims)


@rule(aten.fft_fftshift.default, aten.fft_ifftshift.default, vanish=Vanish.MOVED)
def shift(site: Site, x: Dims, dims: Sequence[int] | None = None) -> Dims:
    """Every index moves by half of the size."""
    site.freeze(x if dims is None else [x[d] for d in dims], "the axis is rolled")
    return x


def _transformed(site: Site, x: Dims, dims: Sequence[int]) -> Dims:
    places = {wrap(dim, len(x)) for dim in dims}
    site.freeze([x[place] for place in places], "a Fourier transform runs over the axis")
    fresh = site.fresh()
    site.freeze([fresh[place] for place in places], "a Fourier transform runs over the axis")
    out: list[Dim] = [fresh[place] if place in places else d for place, d in enumerate(x)]
    return tuple(out)
