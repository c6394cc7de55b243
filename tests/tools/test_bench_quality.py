"""The bench of quality: its arithmetic and its table; the runs themselves take an hour."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.golden import expect_file
from tools.bench import quality

BETTER = {"stage 2": -0.2, "uniform": -0.3}
"""How the variants differ from the dense model, in nats per token; those that are not named are 0.5 worse."""
SPENT = {"lhspg": 1000, "recovery": [200, 300]}


def run(seed: int, ratio: float = 0.2, shift: float = 0.0) -> dict[str, Any]:
    """What one run would have measured: the dense model at ln 8, ln 4, ln 2, and ``shift`` more in this seed."""
    dense = {"code": math.log(8) + shift, "docs": math.log(4) + shift, "topics": math.log(2) + shift}
    losses = {
        name: {domain: nll + (0.0 if name == "dense" else BETTER.get(name, 0.5)) for domain, nll in dense.items()}
        | {"instructions": 1000.0}
        for name in quality.VARIANTS
    }
    repair = {"trained": 2.5, "repaired": 2.25 + 0.5 * seed, "taken": "trained" if seed else "repaired"}
    return {"ratio": ratio, "seed": seed, "losses": losses, "tokens": SPENT, "really": 0.21, "seconds": 120.0,
            "repair": repair}  # fmt: skip


def row(runs: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    (found,) = [r for r in quality.summary(runs) if r["variant"] == variant]
    return found


def test_a_domain_counts_once_and_the_instructions_not_at_all() -> None:
    assert quality.mean({"code": 1.0, "docs": 2.0, "topics": 6.0, "instructions": 1000.0}) == 3.0
    assert row([run(0)], "dense")["perplexity"] == pytest.approx({"code": 8.0, "docs": 4.0, "topics": 2.0})


def test_a_variant_is_compared_with_the_dense_model_of_its_own_seed() -> None:
    seeds = [run(0, shift=-0.1), run(1, shift=0.0), run(2, shift=0.4)]
    worse = row(seeds, "lhspg")
    dense = [math.log(4) + shift for shift in (-0.1, 0.0, 0.4)]
    assert worse["seeds"] == 3
    assert worse["nll"] == pytest.approx(math.log(4) + 0.1 + 0.5)
    assert worse["spread"] == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert worse["degradation"] == pytest.approx(sum(0.5 / nll for nll in dense) / 3)
    assert worse["perplexity degradation"] == pytest.approx(math.exp(0.5) - 1)
    assert worse["perplexity"]["docs"] == pytest.approx(4 * math.exp(0.5) * sum(map(math.exp, (-0.1, 0, 0.4))) / 3)


def test_one_seed_has_no_spread() -> None:
    assert row([run(0)], "lhspg")["spread"] == 0.0


def test_ratios_are_told_apart() -> None:
    rows = quality.summary([run(0, 0.5, shift=1.0), run(0, 0.2)])
    assert [(r["ratio"], r["variant"]) for r in rows] == [(x, name) for x in (0.2, 0.5) for name in quality.VARIANTS]
    dense = [r["nll"] for r in rows if r["variant"] == "dense"]
    assert dense == pytest.approx([math.log(4), math.log(4) + 1.0])


def test_the_verdicts_say_who_is_better_and_in_how_many_seeds() -> None:
    runs = [run(0), run(1)]
    runs[1]["losses"]["magnitude + LoRA"] = dict.fromkeys(quality.DOMAINS, 0.0) | {"instructions": 9e9}
    *sentences, repaired = quality.verdicts(runs)
    recovered, plain, shares, _, uniform = (sentence.partition(" dynamic recovery ")[2] for sentence in sentences)
    assert recovered == ("beats magnitude + stages 1, 2: +0.7000 nats per token in the mean, better in 2 of 2 seeds.")
    assert plain.startswith("does not beat magnitude + plain LoRA")
    assert plain.endswith(": -0.2431 nats per token in the mean, better in 1 of 2 seeds.")
    assert shares.startswith("beats magnitude, layers sharing by knowledge + plain LoRA")
    assert uniform.endswith(": -0.1000 nats per token in the mean, better in 0 of 2 seeds.")
    assert repaired.endswith("those that it trained in 1 of 2 seeds, by 0.0000 nats in the mean.")


def test_the_table_for_people() -> None:
    options = {"parameters": 1943936, "versions": "torch 2.13", "machine": "x86_64, 2 cores"}
    expect_file(quality.markdown([run(0), run(1)], options), "quality.md")
