"""The bench of criteria: its arithmetic and its tables; the runs themselves take most of an hour."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from bench import criteria
from shear_passes.select import ALLOCATIONS
from tests.golden import expect_file

DENSE = {"code": math.log(8), "docs": math.log(4), "topics": math.log(2)}
OPTIONS = {"parameters": 1000, "versions": "torch 2", "machine": "a machine"}


def losses(growth: float) -> dict[str, dict[str, float]]:
    return {domain: {"nll": nll + growth} for domain, nll in DENSE.items()}


def point(name: str, allocation: str, repair: str, ratio: float, shift: float) -> dict[str, Any]:
    growth = ratio * (1 + criteria.CRITERIA.index(name)) * (0.25 if repair != "none" else 1.0) + shift
    return {"importance": name, "allocation": allocation, "repair": repair, "ratio": ratio, "losses": losses(growth)}


def run(seed: int) -> dict[str, Any]:
    """What one seed would have measured: the later a criterion stands in the list, the more it loses."""
    shift = 0.01 * seed
    even = product(criteria.CRITERIA, ["uniform"], criteria.REPAIRS, criteria.RATIOS)
    other = product(criteria.SHARED, [a for a in ALLOCATIONS if a != "uniform"], criteria.REPAIRS, (0.2, 0.5))
    bare = {domain: nll + 0.5 + shift for domain, nll in DENSE.items()}
    return {
        "seed": seed,
        "without": {
            "dense": {"losses": losses(0.0)},
            "points": [point(*each, shift=shift) for each in (*even, *other)],
        },
        "recovered": [
            {"ratio": ratio, "importance": name, "allocation": allocation, "repair": repair, "losses": bare}
            for ratio, (name, allocation, repair) in product((0.2, 0.5), criteria.RECOVERED)
        ],
        "peers": [
            {"importance": name, "ratio": ratio, "really": ratio + 0.001, "losses": bare, "why": ""}
            if ratio < 0.5 else
            {"importance": name, "ratio": ratio, "really": None, "losses": {}, "why": "ValueError: out of reach"}
            for name, ratio in product(criteria.PEERS, criteria.RATIOS)
        ],
        "encoder": [
            {"importance": name, "ratio": ratio, "repair": repair, "rank": 1 - ratio - shift}
            for name, ratio, repair in product(criteria.ENCODER, criteria.RATIOS, criteria.REPAIRS)
        ],
    }  # fmt: skip


def test_the_growth_is_that_of_the_mean_over_the_domains_against_the_dense_model_of_the_seed() -> None:
    found = criteria.growth([run(0), run(1)])
    assert found["magnitude", "uniform", "none", 0.2] == pytest.approx([0.4, 0.41])
    assert found["taylor", "by-knowledge", "least-squares", 0.5] == pytest.approx([0.375, 0.385])


def test_the_verdicts_name_the_best_and_its_share_of_what_taylor_loses() -> None:
    best, unrepaired, repaired, *means = criteria.verdicts([run(0), run(1)])
    assert best.startswith("At 0.2 the best combination, random + least-squares, loses 0.0550 nats")
    assert best.endswith("first-order Taylor by itself loses 0.6050: 9 % of it.")
    assert unrepaired.startswith(
        "At 0.5, without repair, from best to worst: random 0.51 ± 0.01, magnitude 1.01 ± 0.01, "
    )
    assert repaired.startswith("At 0.5, with least squares, from best to worst: random 0.13 ± 0.01, ")
    assert means == [
        "Over all ratios, without repair, magnitude loses least in the mean.", "With least squares, random does."
    ]  # fmt: skip


def test_ranks_alone_count_in_the_correlation() -> None:
    import torch

    values = torch.tensor([0.3, -1.0, 2.0, 0.5])
    assert criteria._spearman(values, values.exp()) == pytest.approx(1.0)
    assert criteria._spearman(values, -values) == pytest.approx(-1.0)


def test_the_tables_for_people(tmp_path: Path) -> None:
    runs = [run(0), run(1)]
    expect_file(criteria.markdown(runs, OPTIONS), "criteria.md")
    criteria.plot(runs, tmp_path / "criteria.svg")
    drawn = (tmp_path / "criteria.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in criteria.CRITERIA)
