"""Axis expressions and their unification: every dim of every tensor has a type, and operators equate types.

    dim ::= Axis(n)                  an atom of size n: can lose indices
          | Product(d1, ..., dk)     row-major: heads x head_dim
          | Concat(d1, ..., dk)      laid end to end: q | k | v

Equality is solved by unification on a union-find, as in Hindley-Milner: an atom binds to anything of its size,
products align from the innermost factor, concats align their boundaries. What has no solution is frozen with a
reason, never guessed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

_ids = itertools.count()

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Hold(IntEnum):
    """How firmly a freeze holds an axis; only ``NORM`` can be lifted, by a rewrite that rescales the norm exactly."""

    NORM = 1
    HARD = 2


@dataclass(frozen=True)
class Freeze:
    """Why an axis cannot lose indices; ``at``: name of the graph node that froze it, empty where none did."""

    reason: str
    hold: Hold = Hold.HARD
    at: str = ""


@dataclass(eq=False)
class Axis:
    """An atom of ``size`` indices. Bound to another expression once unified with it; compared by identity."""

    size: int
    bound: Dim | None = field(default=None, repr=False)
    freeze: Freeze | None = None
    id: int = field(default_factory=_ids.__next__)


@dataclass(frozen=True)
class Product:
    """Row-major product: index ``i`` of the dim is ``(i1, ..., ik)`` with the last factor running fastest."""

    factors: tuple[Dim, ...]

    @cached_property
    def size(self) -> int:
        """Number of indices."""
        return math.prod(f.size for f in self.factors)


@dataclass(frozen=True)
class Concat:
    """Parts laid end to end."""

    parts: tuple[Dim, ...]

    @cached_property
    def size(self) -> int:
        """Number of indices."""
        return sum(p.size for p in self.parts)


Dim = Axis | Product | Concat
Dims = tuple[Dim, ...]

ONE = Product(())
"""The only index of a dim of size 1: it can never be removed and equals every other one."""

EMPTY = Concat(())
"""A dim of size 0."""


def axis(size: int) -> Dim:
    """A fresh atom of ``size`` indices (``ONE`` for size 1, ``EMPTY`` for none)."""
    return Axis(size) if size > 1 else ONE if size else EMPTY


def product(factors: Iterable[Dim]) -> Dim:
    """The product in normal form: nested products are flat, no factor has size 1; empty where a factor is."""
    flat: list[Dim] = []
    for factor in factors:
        flat.extend(factor.factors if isinstance(factor, Product) else [factor])
    if EMPTY in flat:
        return EMPTY
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(parts: Iterable[Dim]) -> Dim:
    """The concatenation in normal form: nested concats are flat, empty parts are gone."""
    flat: list[Dim] = []
    for part in parts:
        if part.size:
            flat.extend(part.parts if isinstance(part, Concat) else [part])
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def find(atom: Axis) -> Dim:
    """What ``atom`` is bound to, with the path compressed; ``atom`` itself when it is free."""
    if atom.bound is None:
        return atom
    path = []
    node: Dim = atom
    while isinstance(node, Axis) and node.bound is not None:
        path.append(node)
        node = node.bound
    for passed in path[:-1]:
        passed.bound = node
    return node


def resolve(dim: Dim) -> Dim:
    """``dim`` in normal form, every bound atom replaced by what it is bound to."""
    if isinstance(dim, Axis):
        if dim.bound is None:
            return dim
        root = find(dim)
        if isinstance(root, Axis):
            return root
        solved = resolve(root)
        dim.bound = solved
        return solved
    children = dim.factors if isinstance(dim, Product) else dim.parts
    if all([isinstance(c, Axis) and c.bound is None for c in children]):
        return dim
    solved_children = [resolve(c) for c in children]
    if all(a is b for a, b in zip(children, solved_children, strict=True)):
        return dim
    return product(solved_children) if isinstance(dim, Product) else concat(solved_children)


def atoms(dim: Dim) -> Iterator[Axis]:
    """The free atoms of ``dim`` from left to right, repeated as often as they occur."""
    solved = resolve(dim)
    if isinstance(solved, Axis):
        yield solved
        return
    stack: list[Dim] = [solved]
    while stack:
        node = stack.pop()
        if isinstance(node, Axis):
            yield node
        else:
            stack.extend(reversed(node.factors if isinstance(node, Product) else node.parts))


def freeze(dim: Dim, reason: str, hold: Hold = Hold.HARD, at: str = "") -> None:
    """Freeze every atom of ``dim``; the first reason of the firmest hold is the one that stays."""
    for atom in atoms(dim):
        if atom.freeze is None or atom.freeze.hold < hold:
            atom.freeze = Freeze(reason, hold, at)


class Freezes:
    """Freezes beside those that inference gave to the axes, which a later analysis finds and returns.

    The axes themselves stay as they were inferred, so that their analysis means the same whoever ran after it.
    """

    def __init__(self, found: Mapping[Axis, Freeze] = MappingProxyType({})) -> None:
        self._found = dict(found)

    def add(self, dim: Dim, reason: str, hold: Hold = Hold.HARD, at: str = "") -> None:
        """Freeze every atom of ``dim``; the first reason of the firmest hold is the one that stays."""
        for atom in atoms(dim):
            known = self.of(atom)
            if known is None or known.hold < hold:
                self._found[atom] = Freeze(reason, hold, at)

    def of(self, atom: Axis) -> Freeze | None:
        """Why an atom cannot lose indices; None where it can."""
        return self._found.get(atom, atom.freeze)

    @property
    def found(self) -> Mapping[Axis, Freeze]:
        """Those that were added."""
        return MappingProxyType(self._found)


def unify(left: Dim, right: Dim, where: str = "", at: str = "") -> bool:
    """Equate two dims. False when no common refinement exists: then every atom of both is frozen, saying ``where``."""
    todo = [(left, right)]
    solved = True
    while todo:
        a, b = todo.pop()
        a, b = resolve(a), resolve(b)
        if a is b or a == b:
            continue
        if not _step(a, b, todo):
            solved = False
            reason = f"sizes do not align: {show(a)} = {show(b)}" + (f" at {where}" if where else "")
            freeze(a, reason, at=at)
            freeze(b, reason, at=at)
    return solved


def split(dim: Dim, at: int) -> tuple[Dim, Dim] | None:
    """``dim`` as two parts with the boundary ``at``, refining atoms on demand; None where a boundary cannot fall."""
    dim = resolve(dim)
    if at == 0 or at == dim.size:
        return (EMPTY, dim) if at == 0 else (dim, EMPTY)
    if isinstance(dim, Axis):
        left, right = axis(at), axis(dim.size - at)
        _bind(dim, Concat((left, right)))
        return left, right
    if isinstance(dim, Concat):
        return _split_concat(dim, at)
    head, inner = dim.factors[0], product(dim.factors[1:])
    if at % inner.size:
        return None
    halves = split(head, at // inner.size)
    # Splitting the head may have refined an atom that the inner factors share, so both are resolved anew.
    return None if halves is None else (resolve(product((halves[0], inner))), resolve(product((halves[1], inner))))


def evaluate(dim: Dim, size: Callable[[Axis], int]) -> int:
    """The size of ``dim`` when each atom has the size that ``size`` gives."""
    if isinstance(dim, Axis) and dim.bound is None:
        return size(dim)
    return _evaluate(resolve(dim), size)


def mask(dim: Dim, kept: Mapping[Axis, Mask]) -> Mask:
    """Which indices of ``dim`` stay when each atom keeps the indices of its mask; shape ``(dim.size,)``."""
    dim = resolve(dim)
    if isinstance(dim, Axis):
        return kept.get(dim, np.ones(dim.size, dtype=bool))
    if isinstance(dim, Concat):
        return np.concatenate([mask(p, kept) for p in dim.parts]) if dim.parts else np.ones(0, dtype=bool)
    result = np.ones(1, dtype=bool)
    for factor in dim.factors:
        result = np.logical_and.outer(result, mask(factor, kept)).reshape(-1)
    return result


def owners(dim: Dim, atom: Axis) -> list[Indices]:
    """Which unit of ``atom`` owns each index of ``dim``: arrays of shape ``(dim.size,)``, -1 where none does.

    More than one array only where the atom is several factors of one product, so that two units share an index.
    """
    dim = resolve(dim)
    if isinstance(dim, Axis):
        return [np.arange(dim.size, dtype=np.int64)] if dim is atom else []
    if isinstance(dim, Product):
        found: list[Indices] = []
        for place, factor in enumerate(dim.factors):
            before = math.prod(f.size for f in dim.factors[:place])
            after = math.prod(f.size for f in dim.factors[place + 1 :])
            found.extend(np.tile(np.repeat(own, after), before) for own in owners(factor, atom))
        return found
    parts = [owners(p, atom) for p in dim.parts]
    none = [np.full(p.size, -1, dtype=np.int64) for p in dim.parts]
    return [
        np.concatenate([own[layer] if layer < len(own) else none[i] for i, own in enumerate(parts)])
        for layer in range(max((len(own) for own in parts), default=0))
    ]


def show(dim: Dim, name: Callable[[Axis], str] | None = None) -> str:
    """``dim`` as text: ``kv:2 * (r:8 | r:8)``; ``name`` gives the atoms their names (default ``a<id>``)."""
    return _show(resolve(dim), name or (lambda atom: f"a{atom.id}"), nested=False)


def _evaluate(dim: Dim, size: Callable[[Axis], int]) -> int:
    if isinstance(dim, Axis):
        return size(dim)
    if isinstance(dim, Product):
        return math.prod([_evaluate(f, size) for f in dim.factors])
    return sum([_evaluate(p, size) for p in dim.parts])


def _show(dim: Dim, name: Callable[[Axis], str], nested: bool) -> str:
    if isinstance(dim, Axis):
        label = name(dim)
        return f"{label}:{dim.size}" if label else str(dim.size)
    if isinstance(dim, Product):
        return " * ".join(_show(f, name, nested=True) for f in dim.factors) if dim.factors else "1"
    text = " | ".join(_show(p, name, nested=False) for p in dim.parts) or "0"
    return f"({text})" if nested or len(dim.parts) > 1 else text


def _bind(atom: Axis, to: Dim) -> None:
    if atom.freeze is not None:
        freeze(to, atom.freeze.reason, atom.freeze.hold, atom.freeze.at)
    atom.bound = to


def _step(a: Dim, b: Dim, todo: list[tuple[Dim, Dim]]) -> bool:
    """Solve one equation of resolved, different dims, or push what is left of it; False when there is no solution."""
    if a.size != b.size:
        return False
    if isinstance(a, Axis):
        _bind(a, b)
        return True
    if isinstance(b, Axis):
        _bind(b, a)
        return True
    if isinstance(a, Concat):
        return _step_concat(a, b, todo)
    if isinstance(b, Concat):
        return _step_concat(b, a, todo)
    return _step_products(a, b, todo)


def _step_products(a: Product, b: Product, todo: list[tuple[Dim, Dim]]) -> bool:
    inner_a, inner_b = a.factors[-1], b.factors[-1]
    if inner_a.size > inner_b.size:
        a, b, inner_a, inner_b = b, a, inner_b, inner_a
    if inner_b.size % inner_a.size:
        return False
    outer = axis(inner_b.size // inner_a.size)
    todo.append((product(a.factors[:-1]), product((*b.factors[:-1], outer))))
    todo.append((inner_b, product((outer, inner_a))))
    return True


def _step_concat(a: Concat, b: Concat | Product, todo: list[tuple[Dim, Dim]]) -> bool:
    if isinstance(b, Product):
        inner = b.factors[-1]
        rows = _whole_rows(a, inner.size)
        outers = [axis(row.size // inner.size) for row in rows]
        if len(rows) > 1:
            todo.append((product(b.factors[:-1]), concat(outers)))
            todo.extend((row, product((outer, inner))) for row, outer in zip(rows, outers, strict=True))
        return len(rows) > 1
    if a.parts[0].size > b.parts[0].size:
        a, b = b, a
    halves = split(b, a.parts[0].size)
    if halves is None:
        a, b = b, a
        halves = split(b, a.parts[0].size)
    if halves is None:
        return False
    head, rest = a.parts[0], concat(a.parts[1:])
    todo.append((rest, halves[1]))
    todo.append((head, halves[0]))
    return True


def _whole_rows(dim: Concat, width: int) -> list[Dim]:
    """The parts of ``dim``, neighbours taken together, as the smallest pieces that hold a multiple of ``width``."""
    rows: list[Dim] = []
    row: list[Dim] = []
    end = 0
    for part in dim.parts:
        row.append(part)
        end += part.size
        if end % width == 0:
            rows.append(concat(row))
            row = []
    return rows


def _split_concat(dim: Concat, at: int) -> tuple[Dim, Dim] | None:
    end = 0
    for place, part in enumerate(dim.parts):
        if at < end + part.size:
            halves = split(part, at - end)
            if halves is None:
                return None
            return (
                resolve(concat((*dim.parts[:place], halves[0]))),
                resolve(concat((halves[1], *dim.parts[place + 1 :]))),
            )
        end += part.size
        if at == end:
            return concat(dim.parts[: place + 1]), concat(dim.parts[place + 1 :])
    raise AssertionError("boundary outside the dim")
