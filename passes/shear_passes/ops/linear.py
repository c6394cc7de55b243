"""Products of matrices: linear, addmm, mm, bmm, baddbmm, matmul, einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shear_ir.axes import Dim, Dims
from shear_passes.ops.pointwise import broadcast
from shear_passes.ops.registry import Need, Results, Site, rule, wrap
from shear_passes.ops.traits import Role, WeightedProduct, traits

aten = torch.ops.aten


def _of_linear(node: fx.Node, rank: Callable[[fx.Node], int]) -> list[WeightedProduct]:
    """Features stand last in the value and in the weight, which may be stored turned."""
    return [WeightedProduct(0, 1, -1, -2 if node.kwargs.get("transposed") else -1)]


def _of_groups(node: fx.Node, rank: Callable[[fx.Node], int]) -> list[WeightedProduct]:
    """The rows of a value, each times the matrix of its group."""
    return [WeightedProduct(0, 1, -1, -2)]


def _of_matrices(a: int, b: int) -> Callable[[fx.Node, Callable[[fx.Node], int]], list[WeightedProduct]]:
    """Either side of a product of matrices may be the weight."""

    def products(node: fx.Node, rank: Callable[[fx.Node], int]) -> list[WeightedProduct]:
        both = all(isinstance(o := node.args[p], fx.Node) and rank(o) > 1 for p in (a, b))
        return [WeightedProduct(a, b, -1, -2), WeightedProduct(b, a, -2, -1)] if both else []

    return products


traits("linear", products=_of_linear, scores=True, role=Role.LINEAR)
traits("lora.linear", products=_of_linear)
traits("mm", factors=(0, 1), products=_of_matrices(0, 1), scores=True)
traits("bmm", factors=(0, 1), products=_of_matrices(0, 1))
traits("matmul", products=_of_matrices(0, 1), scores=True)
traits("addmm", factors=(1, 2), products=_of_matrices(1, 2), scores=True)
traits("baddbmm", factors=(1, 2), products=_of_matrices(1, 2))
traits("grouped_mm transformers.grouped_mm_fallback", factors=(0, 1), products=_of_groups)


@rule(aten.linear.default)
def linear(site: Site, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    """``y[..., o] = sum_i x[..., i] * w[o, i] + b[o]``: o follows w's rows, i its columns."""
    if len(weight) == 1:
        site.equate(x[-1], weight[0])
        site.contract([x[-1]], [(0, x[:-1]), (1, ())], added=[2])
        return x[:-1]
    out, in_ = weight
    site.equate(x[-1], in_)
    if bias is not None:
        site.equate(bias[0], out)
    site.contract([in_], [(0, x[:-1]), (1, [out])], added=[2])
    return (*x[:-1], out)


@rule(aten.bilinear.default)
def bilinear(site: Site, x: Dims, y: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    """``z[..., o] = sum_ij x[..., i] * w[o, i, j] * y[..., j] + b[o]``."""
    out, left, right = weight
    site.equate(x[-1], left)
    site.equate(y[-1], right)
    if bias is not None:
        site.equate(bias[0], out)
    lead = broadcast(site, [x[:-1], y[:-1]])
    site.contract([left], [(0, x[:-1]), (2, [out, right])], inner=True)
    site.contract([right], [(1, y[:-1]), (2, [out])], added=[3])
    return (*lead, out)


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default,
    aten.vdot.default,
)  # fmt: skip
def matmul(site: Site, a: Dims, b: Dims) -> Dims:
    """``y[..., m, n] = sum_k a[..., m, k] * b[..., k, n]``; leading dims broadcast, vectors have no m or n."""
    return _product(site, (0, a), (1, b))


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(site: Site, added: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """``y = added + a @ b``, with the addend broadcast."""
    out = _product(site, (1, a), (2, b), added=[0])
    return broadcast(site, [out, added])


@rule(aten.addmv.default)
def addmv(site: Site, added: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """``y[m] = added[m] + sum_k a[m, k] * b[k]``."""
    return broadcast(site, [_product(site, (1, a), (2, b), added=[0]), added])


@rule(aten.addbmm.default)
def addbmm(site: Site, added: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """``y[m, n] = added[m, n] + sum_bk a[b, m, k] * b[b, k, n]``."""
    site.equate(a[0], b[0])
    site.equate(a[2], b[1])
    site.contract([a[0], a[2]], [(1, [a[1]]), (2, [b[2]])], added=[0])
    return broadcast(site, [(a[1], b[2]), added])


@rule(aten.addr.default)
def addr(site: Site, added: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """``y[m, n] = added[m, n] + a[m] * b[n]``."""
    site.contract([], [(1, a), (2, b)], added=[0])
    return broadcast(site, [(a[0], b[0]), added])


@rule(aten.linalg_vecdot.default)
def vecdot(site: Site, a: Dims, b: Dims, *, dim: int = -1) -> Dims:
    """``y[...] = sum_k a[..., k] * b[..., k]`` over a dim of both, after broadcasting."""
    both = broadcast(site, [a, b])
    place = wrap(dim, len(both)) - len(both)
    free_a, free_b = ((*x[: len(x) + place], *x[len(x) + place + 1 :]) for x in (a, b))
    site.contract([both[place]], [(0, free_a), (1, free_b)])
    return (*both[: len(both) + place], *both[len(both) + place + 1 :])


@rule(aten.outer.default, aten.ger.default)
def outer(site: Site, a: Dims, b: Dims) -> Dims:
    """``y[m, n] = a[m] * b[n]``."""
    site.contract([], [(0, a), (1, b)])
    return (a[0], b[0])


@rule(aten.inner.default)
def inner(site: Site, a: Dims, b: Dims) -> Dims:
    """``y[..., m] = sum_k a[..., k] * b[m, k]``: both last dims are summed over. With a number, the product by it."""
    if not a or not b:
        site.contract([], [(0, a), (1, b)])
        return (*a, *b)
    site.equate(a[-1], b[-1])
    site.contract([a[-1]], [(0, a[:-1]), (1, b[:-1])])
    return (*a[:-1], *b[:-1])


@rule(aten.tensordot.default)
def tensordot(site: Site, a: Dims, b: Dims, dims_a: list[int], dims_b: list[int]) -> Dims:
    """The dims of one list are summed over with those of the other; what is left stands side by side."""
    over_a, over_b = [wrap(d, len(a)) for d in dims_a], [wrap(d, len(b)) for d in dims_b]
    for place_a, place_b in zip(over_a, over_b, strict=True):
        site.equate(a[place_a], b[place_b])
    free_a = [d for place, d in enumerate(a) if place not in over_a]
    free_b = [d for place, d in enumerate(b) if place not in over_b]
    site.contract([a[place] for place in over_a], [(0, free_a), (1, free_b)])
    return (*free_a, *free_b)


def _product(site: Site, left: tuple[int, Dims], right: tuple[int, Dims], added: list[int] | None = None) -> Dims:
    (place_a, a), (place_b, b) = left, right
    k_b = b[-2] if len(b) > 1 else b[0]
    site.equate(a[-1], k_b)
    lead = broadcast(site, [a[:-2], b[:-2]])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    free_a, free_b = (*a[:-2], *rows), (*b[:-2], *columns)
    site.contract([a[-1]], [(place_a, free_a), (place_b, free_b)], added=added or [])
    return (*lead, *rows, *columns)


@rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def grouped_mm(site: Site, x: Dims, weight: Dims, offs: Dims | None = None, *_: Any, **__: Any) -> Dims | Results:
    """``y[s, o] = sum_i x[s, i] * w[e(s), i, o]``: the rows of expert e end at ``offs[e]``, so one may have none.

    The kernels want every row of their operands to be a multiple of 16 bytes.
    """
    if len(x) != 2 or len(weight) != 3:
        return site.barrier("a grouped product that is not rows by experts")
    experts, in_, out = weight
    site.equate(x[1], in_)
    site.freeze([x[0]], "experts are chosen by value")
    if offs is not None:
        site.equate(offs[0], experts)
        site.rank(2 if len(site.node.args) > 2 else "offs", experts, Need.REPEATED, "experts are chosen by value")
    else:
        site.freeze([experts], "experts are chosen by value")
    site.align([in_, out], bytes=16)
    site.contract([in_], [(0, x[:1]), (1, [out])], added=["bias"])
    return (x[0], out)


@rule(aten.einsum.default)
def einsum(site: Site, equation: str, operands: list[Dims], **_: Any) -> Dims | Results:
    """One axis per letter; letters that are missing on the right are contracted. An ellipsis broadcasts."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(c for c in set(left) - {",", "."} if left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    by_letter: dict[str, Dim] = {}
    ellipses: list[Dims] = []
    free: list[list[Dim]] = []
    for term, dims in zip(terms, operands, strict=True):
        letters_of = _spread(term, len(dims))
        if len(set(letters_of)) != len(letters_of):
            return site.barrier("a diagonal in einsum")
        kept: list[Dim] = []
        for letter, dim in zip(letters_of, dims, strict=True):
            if letter in by_letter and by_letter[letter].size == dim.size:
                site.equate(by_letter[letter], dim)
            elif letter not in by_letter or by_letter[letter].size == 1:
                by_letter[letter] = dim
            if letter in right or letter.isdigit():
                kept.append(dim)
        free.append(kept)
        ellipses.append(tuple(d for c, d in zip(letters_of, dims, strict=True) if c.isdigit()))
    over = [dim for letter, dim in by_letter.items() if letter not in right and not letter.isdigit()]
    site.contract(over, list(zip(site.node.args[1], free, strict=True)))  # type: ignore[arg-type]
    lead = broadcast(site, ellipses)
    before, ellipsis, after = right.partition("...")
    lead = lead if ellipsis else ()
    return (*(by_letter[c] for c in before), *lead, *(by_letter[c] for c in after))


def _spread(term: str, rank: int) -> str:
    """``term`` with its ellipsis written as digits, counted from the right."""
    if "..." not in term:
        return term
    hidden = rank - len(term) + 3
    return term.replace("...", "".join(str(i) for i in reversed(range(hidden))))
