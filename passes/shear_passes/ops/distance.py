"""Distances and likenesses of rows: sums over features, which miss nothing where both sides are zero."""

from __future__ import annotations

import torch

from shear_ir.axes import ONE, Dims
from shear_passes.ops.pointwise import broadcast
from shear_passes.ops.registry import Site, rule, wrap

aten = torch.ops.aten


@rule(aten.cdist.default, aten._cdist_forward.default, aten._euclidean_dist.default)
def cdist(site: Site, x: Dims, y: Dims, *_: object) -> Dims:
    """``d[..., m, n] = (sum_i |x[..., m, i] - y[..., n, i]|^p)^(1/p)``, a largest or a count for other p."""
    site.equate(x[-1], y[-1])
    lead = broadcast(site, [x[:-2], y[:-2]])
    # Of a difference each side has to be zero by itself.
    site.contract([x[-1]], [(0, x[:-1])])
    site.contract([y[-1]], [(1, y[:-1])])
    return (*lead, x[-2], y[-2])


@rule(aten.pairwise_distance.default)
def pairwise_distance(
    site: Site, x: Dims, y: Dims, order: float = 2.0, epsilon: float = 1e-6, keepdim: bool = False
) -> Dims:
    """``d[...] = |x[..., i] - y[..., i] + epsilon|``: to every entry something is added, also where both are zero."""
    both = broadcast(site, [x, y])
    if epsilon:
        site.freeze(both[-1:], "an epsilon is added to every entry before it is summed up")
    for place, side in enumerate((x, y)):
        site.contract(both[-1:], [(place, side[:-1])], inner=bool(epsilon))
    return (*both[:-1], ONE) if keepdim else both[:-1]


@rule(aten.cosine_similarity.default)
def cosine_similarity(site: Site, x: Dims, y: Dims, dim: int = 1, *_: object) -> Dims:
    """``c = sum x y / (|x| |y|)`` over a dim; both lengths miss nothing where x and y are zero."""
    both = broadcast(site, [x, y])
    place = wrap(dim, len(both))
    rest = (*both[:place], *both[place + 1 :])
    for number, side in enumerate((x, y)):
        at = place - (len(both) - len(side))
        site.contract([both[place]], [(number, (*side[:at], *side[at + 1 :]))], inner=True)
    return rest
