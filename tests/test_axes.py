"""The algebra of axes: what unification promises, checked against what an expression means, index by index."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from shear_ir.axes import (
    EMPTY,
    ONE,
    Axis,
    Concat,
    Dim,
    Hold,
    Mask,
    Product,
    atoms,
    axis,
    concat,
    evaluate,
    find,
    freeze,
    mask,
    owners,
    product,
    resolve,
    show,
    split,
    unify,
)  # fmt: skip

# Recipes: expressions as plain data, so that one system of equations can be built twice and solved in two orders.


@dataclass(frozen=True)
class Atom:
    key: int
    size: int


@dataclass(frozen=True)
class Times:
    factors: tuple[Recipe, ...]


@dataclass(frozen=True)
class Beside:
    parts: tuple[Recipe, ...]


Recipe = Atom | Times | Beside


@dataclass
class Build:
    """Recipes made into dims; equal keys are one atom."""

    made: dict[int, Dim] = field(default_factory=dict)

    def __call__(self, recipe: Recipe) -> Dim:
        if isinstance(recipe, Atom):
            return self.made.setdefault(recipe.key, axis(recipe.size))
        if isinstance(recipe, Times):
            return product(self(f) for f in recipe.factors)
        return concat(self(p) for p in recipe.parts)


def size_of(recipe: Recipe) -> int:
    if isinstance(recipe, Atom):
        return recipe.size
    if isinstance(recipe, Times):
        return int(np.prod([size_of(f) for f in recipe.factors]))
    return sum(size_of(p) for p in recipe.parts)


class Keys:
    """Keys for atoms: mostly new ones, now and then one that another atom of the size has."""

    def __init__(self, draw: st.DrawFn, sharing: bool) -> None:
        self.draw, self.sharing = draw, sharing
        self.count = itertools.count()
        self.used: dict[int, list[int]] = {}

    def atom(self, size: int) -> Atom:
        used = self.used.setdefault(size, [])
        if used and self.sharing and self.draw(st.integers(0, 3)) == 0:
            return Atom(self.draw(st.sampled_from(used)), size)
        used.append(next(self.count))
        return Atom(used[-1], size)


def refined(draw: st.DrawFn, size: int, keys: Keys, depth: int = 3) -> Recipe:
    """A random expression of ``size`` indices."""
    divisors = [d for d in range(2, size) if size % d == 0]
    ways = ["atom", *(["times"] if divisors else []), *(["beside"] if size > 1 else [])]
    way = draw(st.sampled_from(ways)) if depth else "atom"
    if way == "times":
        inner = draw(st.sampled_from(divisors))
        return Times((refined(draw, size // inner, keys, depth - 1), refined(draw, inner, keys, depth - 1)))
    if way == "beside":
        at = draw(st.integers(1, size - 1))
        return Beside((refined(draw, at, keys, depth - 1), refined(draw, size - at, keys, depth - 1)))
    return keys.atom(size)


@st.composite
def recipes(draw: st.DrawFn, count: int = 1, sharing: bool = True) -> tuple[Recipe, ...]:
    """``count`` random expressions of one size."""
    size = draw(st.sampled_from([2, 3, 4, 6, 8, 12, 16, 24]))
    keys = Keys(draw, sharing)
    return tuple(refined(draw, size, keys) for _ in range(count))


@st.composite
def systems(draw: st.DrawFn) -> tuple[list[Recipe], list[tuple[int, int]], list[tuple[int, int]]]:
    """Coarse views of one hidden expression, and equations that tie them all together in two orders."""
    (truth,) = draw(recipes(sharing=False))
    keys = itertools.count(1000)
    views = [coarser(draw, truth, keys) for _ in range(draw(st.integers(2, 5)))]
    ties = [(draw(st.integers(0, i - 1)), i) for i in range(1, len(views))]
    again = [(b, a) if draw(st.booleans()) else (a, b) for a, b in draw(st.permutations(ties))]
    return views, ties, again


def coarser(draw: st.DrawFn, recipe: Recipe, keys: Iterator[int]) -> Recipe:
    """``recipe`` with parts of it, or neighbours in it, taken as one new atom; every atom is a new one."""
    if isinstance(recipe, Atom) or draw(st.integers(0, 3)) == 0:
        return Atom(next(keys), size_of(recipe))
    flat = list(_flat(recipe))
    joined: list[list[Recipe]] = []
    for child in flat:
        if joined and draw(st.integers(0, 2)) == 0:
            joined[-1].append(child)
        else:
            joined.append([child])
    kind = type(recipe)
    children = [
        coarser(draw, group[0], keys) if len(group) == 1 else Atom(next(keys), size_of(kind(tuple(group))))
        for group in joined
    ]
    return kind(tuple(children))


def _flat(recipe: Times | Beside) -> Iterator[Recipe]:
    for child in recipe.factors if isinstance(recipe, Times) else recipe.parts:
        if type(child) is type(recipe):
            yield from _flat(child)  # type: ignore[arg-type]
        else:
            yield child


def renamed(dims: Sequence[Dim]) -> list[str]:
    """The dims as text, their atoms named in order of first appearance, frozen ones marked."""
    names: dict[Axis, str] = {}

    def name(atom: Axis) -> str:
        return names.setdefault(atom, f"{chr(97 + len(names) % 26)}{'!' if atom.freeze else ''}")

    return [show(d, name) for d in dims]


def random_masks(draw: st.DrawFn, dims: Sequence[Dim]) -> dict[Axis, Mask]:
    """A mask for every atom that is not frozen."""
    free = dict.fromkeys(a for d in dims for a in atoms(d) if a.freeze is None)
    return {a: np.array(draw(st.lists(st.booleans(), min_size=a.size, max_size=a.size)), dtype=bool) for a in free}


def meaning(recipe: Recipe) -> list[frozenset[tuple[int, int]]]:
    """For every index of the expression, the units (key, index) that all must stay for it to stay."""
    if isinstance(recipe, Atom):
        return [frozenset({(recipe.key, i)}) if recipe.size > 1 else frozenset() for i in range(recipe.size)]
    if isinstance(recipe, Beside):
        return [label for part in recipe.parts for label in meaning(part)]
    rows = [frozenset[tuple[int, int]]()]
    for factor in recipe.factors:
        rows = [row | label for row in rows for label in meaning(factor)]
    return rows


def stays_by_meaning(recipe: Recipe, units: Mapping[tuple[int, int], bool]) -> Mask:
    return np.array([all(units[u] for u in label) for label in meaning(recipe)], dtype=bool)


@given(st.data())
def test_an_expression_means_what_it_says(data: st.DataObject) -> None:
    (recipe,) = data.draw(recipes())
    build = Build()
    dim = build(recipe)
    masks = random_masks(data.draw, [dim])
    units = {(key, i): bool(masks[a][i]) for key, a in build.made.items() if isinstance(a, Axis) for i in range(a.size)}
    assert mask(dim, masks).tolist() == stays_by_meaning(recipe, units).tolist()


@given(st.data())
def test_equations_hold_for_every_choice_of_units_solved_or_not(data: st.DataObject) -> None:
    """The oracle of soundness: after unification no choice of free units tells the two sides apart.

    The original recipes say what each side means; the solution of its atoms says which of its units stay.
    """
    left, right = data.draw(recipes(count=2))
    build = Build()
    a, b = build(left), build(right)
    solved = unify(a, b)
    note(f"{solved}: {renamed([a, b])}")
    masks = random_masks(data.draw, [a, b])
    units = {(key, i): bool(on) for key, dim in build.made.items() for i, on in enumerate(mask(dim, masks))}
    assert stays_by_meaning(left, units).tolist() == stays_by_meaning(right, units).tolist()
    assert mask(a, masks).tolist() == stays_by_meaning(left, units).tolist()


@given(st.data())
def test_systems_of_equations_hold_together(data: st.DataObject) -> None:
    """As above with many equations over shared atoms: a later one may not break an earlier one."""
    sides = data.draw(recipes(count=4))
    build = Build()
    dims = [build(r) for r in sides]
    for i, j in data.draw(st.permutations([(0, 1), (1, 2), (0, 3)])):
        unify(dims[i], dims[j])
    masks = random_masks(data.draw, dims)
    first, *others = [mask(d, masks).tolist() for d in dims]
    assert all(other == first for other in others)


@given(systems())
def test_views_of_one_dim_always_unify(
    system: tuple[list[Recipe], list[tuple[int, int]], list[tuple[int, int]]],
) -> None:
    views, ties, _ = system
    dims = [Build()(v) for v in views]
    assert all(unify(dims[i], dims[j]) for i, j in ties)
    assert len({show(d) for d in dims}) == 1


@given(systems())
def test_the_order_of_equations_does_not_matter(
    system: tuple[list[Recipe], list[tuple[int, int]], list[tuple[int, int]]],
) -> None:
    views, *orders = system
    results = []
    for order in orders:
        dims = [Build()(v) for v in views]
        for i, j in order:
            unify(dims[i], dims[j])
        results.append(renamed(dims))
    assert results[0] == results[1]


@given(recipes(count=2))
def test_unification_is_symmetric(pair: tuple[Recipe, Recipe]) -> None:
    results = []
    for turned in (False, True):
        build = Build()
        a, b = build(pair[0]), build(pair[1])
        solved = unify(b, a) if turned else unify(a, b)
        results.append((solved, renamed([a, b]) if solved else []))
    assert results[0] == results[1]


@given(recipes(count=2, sharing=False))
def test_a_solved_equation_stays_solved(pair: tuple[Recipe, Recipe]) -> None:
    build = Build()
    a, b = build(pair[0]), build(pair[1])
    if unify(a, b):
        before = renamed([a, b])
        assert unify(a, b)
        assert renamed([a, b]) == before


@given(recipes(count=2))
def test_an_equation_without_solution_leaves_nothing_free_that_differs(pair: tuple[Recipe, Recipe]) -> None:
    build = Build()
    a, b = build(pair[0]), build(pair[1])
    if not unify(a, b):
        assert any(atom.freeze for d in (a, b) for atom in atoms(d)) or not any(atoms(a)) or not any(atoms(b))


@given(recipes(), recipes())
def test_different_sizes_freeze_both_sides_and_say_where(one: tuple[Recipe], two: tuple[Recipe]) -> None:
    a, b = Build()(one[0]), Build()(two[0])
    if a.size == b.size:
        return
    assert not unify(a, b, "%add = aten.add")
    for atom in (*atoms(a), *atoms(b)):
        assert atom.freeze is not None
        assert atom.freeze.hold is Hold.HARD
        assert atom.freeze.reason.startswith("sizes do not align: ")
        assert atom.freeze.reason.endswith(" at %add = aten.add")


@given(recipes(count=2))
def test_sizes_stay_what_they_were(pair: tuple[Recipe, Recipe]) -> None:
    build = Build()
    dims = [build(r) for r in pair]
    unify(*dims)
    for dim, recipe in zip(dims, pair, strict=True):
        assert dim.size == resolve(dim).size == evaluate(dim, lambda a: a.size) == mask(dim, {}).size == size_of(recipe)


@given(st.data())
def test_the_size_after_a_cut_is_the_number_of_indices_that_stay(data: st.DataObject) -> None:
    pair = data.draw(recipes(count=2))
    build = Build()
    dims = [build(r) for r in pair]
    unify(*dims)
    masks = random_masks(data.draw, dims)
    for dim in dims:
        size = evaluate(dim, lambda a: int(masks[a].sum()) if a in masks else a.size)
        assert size == int(mask(dim, masks).sum())


@given(st.data())
def test_a_part_begins_where_it_was_cut(data: st.DataObject) -> None:
    (recipe,) = data.draw(recipes())
    dim = Build()(recipe)
    at = data.draw(st.integers(0, dim.size))
    halves = split(dim, at)
    if halves is None:
        return
    masks = random_masks(data.draw, [dim])
    assert (halves[0].size, halves[1].size) == (at, dim.size - at)
    assert [*mask(halves[0], masks), *mask(halves[1], masks)] == mask(dim, masks).tolist()


@given(st.data())
def test_owners_are_the_indices_that_go_with_a_unit(data: st.DataObject) -> None:
    (recipe,) = data.draw(recipes())
    dim = Build()(recipe)
    for atom in dict.fromkeys(atoms(dim)):
        unit = data.draw(st.integers(0, atom.size - 1))
        without = np.arange(atom.size) != unit
        owned = np.any([own == unit for own in owners(dim, atom)], axis=0)
        assert (~mask(dim, {atom: without})).tolist() == owned.tolist()


def test_nothing_owns_what_the_atom_is_not_in() -> None:
    assert owners(axis(4), Axis(4)) == []


@given(st.data())
def test_a_freeze_reaches_all_that_an_atom_is_bound_to(data: st.DataObject) -> None:
    pair = data.draw(recipes(count=2, sharing=False))
    build = Build()
    a, b = build(pair[0]), build(pair[1])
    frozen = [d for d in build.made.values() if isinstance(d, Axis) and data.draw(st.booleans())]
    for atom in frozen:
        freeze(atom, "held", data.draw(st.sampled_from(list(Hold))))
    holds = {atom: atom.freeze.hold for atom in frozen if atom.freeze}
    unify(a, b)
    for atom, hold in holds.items():
        for inside in atoms(atom):
            assert inside.freeze is not None
            assert inside.freeze.hold >= hold


@given(st.data())
def test_a_later_freeze_reaches_what_was_bound_before(data: st.DataObject) -> None:
    pair = data.draw(recipes(count=2))
    build = Build()
    a, b = build(pair[0]), build(pair[1])
    unify(a, b)
    freeze(a, "held")
    assert all(atom.freeze for atom in atoms(a))


def test_the_firmest_hold_keeps_its_first_reason() -> None:
    atom = Axis(4)
    freeze(atom, "norm", Hold.NORM)
    freeze(atom, "output")
    freeze(atom, "input")
    freeze(atom, "norm again", Hold.NORM)
    assert atom.freeze is not None
    assert (atom.freeze.reason, atom.freeze.hold) == ("output", Hold.HARD)


def named(**dims: Dim) -> dict[str, str]:
    """The dims as text; atoms of ``dims`` that are still free keep their names, others are a, b, c in order."""
    names: dict[Axis, str] = {find(d): n for n, d in dims.items() if isinstance(d, Axis) and find(d) is d}  # type: ignore[misc]
    fresh = iter("abcdefg")
    return {
        n: show(d, lambda atom: names.setdefault(atom, next(fresh)) + ("!" if atom.freeze else ""))
        for n, d in dims.items()
    }


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        pytest.param([12], [3, 4], "a:3 * b:4", id="an atom takes any shape"),
        pytest.param([6, 4], [2, 12], "a:2 * b:3 * c:4", id="products align from the inside"),
        pytest.param([2, 3, 4], [24], "a:2 * b:3 * c:4", id="an atom takes a long product"),
        pytest.param([6, 4], [4, 6], "a!:6 * b!:4", id="products without common factors freeze"),
    ],
)
def test_products(left: list[int], right: list[int], expected: str) -> None:
    a, b = product(axis(s) for s in left), product(axis(s) for s in right)
    unify(a, b)
    assert renamed([a]) == [expected]


def test_a_concat_of_multiples_takes_the_inner_factor() -> None:
    heads, width = axis(6), axis(4)
    parts = [axis(12), axis(8), axis(4)]
    assert unify(concat(parts), product((heads, width)))
    assert renamed([*parts, heads, width]) == ["a:3 * b:4", "c:2 * b:4", "b:4", "(a:3 | c:2 | 1)", "b:4"]


def test_parts_that_fill_a_row_together_are_its_inner_factor() -> None:
    """Rows of 8: 3 | 5 is one, 8 another, so the atom of 8 is 3 | 5 too."""
    parts = [axis(3), axis(5), axis(8)]
    assert unify(concat(parts), product((axis(2), axis(8))))
    assert renamed(parts) == ["a:3", "b:5", "(a:3 | b:5)"]


def test_an_equation_that_holds_needs_no_freeze() -> None:
    pair, atom = concat([ONE, ONE]), axis(3)
    spread = concat((pair, product((atom, pair))))
    assert unify(product((concat((ONE, atom)), pair)), spread)
    assert renamed([atom]) == ["a:3"]


def test_a_concat_that_cuts_the_inner_factor_freezes() -> None:
    heads, width = axis(6), axis(4)
    assert not unify(concat([axis(13), axis(11)]), product((heads, width)))
    assert renamed([heads, width]) == ["a!:6", "b!:4"]


def test_constants_are_not_atoms() -> None:
    dim = axis(3)
    assert unify(dim, concat([ONE] * 3))
    assert list(atoms(dim)) == []
    assert show(dim) == "(1 | 1 | 1)"


def test_a_dim_without_indices_equals_every_other_one() -> None:
    assert axis(0) is EMPTY
    assert product((axis(3), axis(0))) is EMPTY
    assert concat([axis(0), axis(0)]) == EMPTY
    assert unify(axis(0), product((axis(0), axis(5))))
    assert mask(EMPTY, {}).tolist() == []
    assert owners(EMPTY, Axis(2)) == []
    assert show(EMPTY) == "0"


def test_normal_forms_are_flat_and_without_ones() -> None:
    a, b = axis(2), axis(3)
    assert product((product((a, ONE)), ONE, b)) == Product((a, b))
    assert concat((concat((a, EMPTY)), concat((b,)))) == Concat((a, b))
    assert product((a,)) is a
    assert concat((a,)) is a
    assert product(()) is not None
    assert axis(1) is ONE


def test_long_chains_of_atoms_resolve_without_recursion() -> None:
    chain = [Axis(4) for _ in range(5000)]
    for a, b in itertools.pairwise(chain):
        a.bound = b
    assert resolve(chain[0]) is chain[-1]
    assert find(chain[0]) is chain[-1]
