"""Mixtures: weights with a floor that grow with degradation, counts that add up, rows that come once before twice."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shear_ir.errors import PlanError
from shear_training.mixture import Sampler, counts, degradation, shuffled, weights

NAMES = st.lists(st.text("abcdef", min_size=1), min_size=1, max_size=6, unique=True)
DEVIATIONS = NAMES.flatmap(
    lambda names: st.fixed_dictionaries(dict.fromkeys(names, st.floats(0, 1e300) | st.sampled_from([0.0, 5e-324])))
)
FLOORS = st.floats(0.0, 1.0)


@given(DEVIATIONS, FLOORS)
def test_weights_sum_to_one_and_keep_the_floor(deviations: dict[str, float], floor: float) -> None:
    made = weights(deviations, floor)
    assert math.fsum(made.values()) == pytest.approx(1.0, abs=1e-12)
    assert min(made.values()) >= floor / len(made) * (1 - 1e-12)


@given(DEVIATIONS, FLOORS)
def test_a_more_degraded_source_never_gets_less(deviations: dict[str, float], floor: float) -> None:
    made = weights(deviations, floor)
    ordered = sorted(deviations, key=lambda name: deviations[name])
    assert all(made[a] <= made[b] for a, b in pairwise(ordered))


@given(st.lists(st.floats(1e-2, 10.0), min_size=2, max_size=6), st.floats(1e-2, 10.0))
def test_a_weight_grows_with_its_own_deviation(deviations: list[float], more: float) -> None:
    before = dict(zip("abcdef", deviations, strict=False))
    after = {**before, "a": before["a"] + more}
    assert weights(after)["a"] > weights(before)["a"]
    assert all(weights(after)[name] < weights(before)[name] for name in list(before)[1:])


def test_the_formula_on_numbers_that_can_be_checked_by_hand() -> None:
    assert weights({"a": 3.0, "b": 1.0}) == pytest.approx({"a": 0.8 * 0.75 + 0.1, "b": 0.8 * 0.25 + 0.1})
    assert weights({"a": 0.0, "b": 0.0, "c": 0.0}) == dict.fromkeys("abc", 1 / 3)
    assert degradation({"a": 2.5, "b": 1.0}, {"a": 2.0, "b": 3.0}) == {"a": 0.5, "b": 0.0}


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_degradation_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(PlanError, match="the degradation of b is "):
        weights({"a": 1.0, "b": bad})
    with pytest.raises(PlanError, match="the floor of a mixture is a share"):
        weights({"a": 1.0}, bad)


@given(DEVIATIONS, st.integers(0, 5000))
def test_counts_add_up_and_are_the_share_rounded_up_or_down(deviations: dict[str, float], total: int) -> None:
    shares = weights(deviations)
    made = counts(shares, total)
    assert sum(made.values()) == total
    assert all(abs(made[name] - shares[name] * total) < 1 + 1e-6 for name in made)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 7), min_size=1), st.lists(st.integers(0, 9), max_size=6))
def test_every_row_comes_once_before_any_comes_twice(sizes: dict[str, int], wanted: list[int]) -> None:
    sampler = Sampler(sizes, seed=3)
    drawn = [draw for count in wanted for draw in sampler.draw(dict.fromkeys(sizes, count))]
    for name, size in sizes.items():
        rows = [row for source, row in drawn if source == name]
        assert len(rows) == sum(wanted)
        for start in range(0, len(rows), size):
            turn = rows[start : start + size]
            assert len(set(turn)) == len(turn)
            assert set(turn) <= set(range(size))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 5))
def test_a_sampler_goes_on_from_its_state(first: int, second: int, seed: int) -> None:
    sizes = {"a": 5, "b": 8}
    whole = Sampler(sizes, seed)
    begun = whole.draw({"a": first, "b": second})
    resumed = Sampler(sizes, seed, json.loads(json.dumps(whole.drawn)))
    assert resumed.draw({"a": 4, "b": 3}) == whole.draw({"a": 4, "b": 3})
    # Neither the size of the draws nor other sources change what comes.
    assert [d for d in begun if d[0] == "a"] == Sampler(sizes, seed).draw({"a": first})


def test_orders_differ_by_source_seed_turn_round_and_epoch() -> None:
    rows = [row for _, row in Sampler({"a": 50, "b": 50}, 0).draw({"a": 100, "b": 100})]
    assert len({tuple(rows[i : i + 50]) for i in range(0, 200, 50)}) == 4
    assert Sampler({"a": 50}, 1).draw({"a": 50}) != Sampler({"a": 50}, 0).draw({"a": 50})
    drawn = [("a", row) for row in range(30)]
    made = shuffled(drawn, epochs=2, seed=0, number=1)
    assert Counter(made) == Counter(drawn * 2)
    assert made[:30] != made[30:]
    assert shuffled(drawn, 2, 0, 1) == made != shuffled(drawn, 2, 0, 2)
