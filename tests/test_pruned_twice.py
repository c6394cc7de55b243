"""Cuts compose: pruning twice is pruning once by the joined plan, in memory and through a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import shear_ir as sir
from shear_ir.plans import Plan
from tests.roads import Traced, outputs, same, trace, traced
from tests.test_families import kinds_of
from tests.zoo import FAMILIES

SEVERAL = ("mlp", "resnet", "llama_gqa", "gpt2", "mixtral_batched")
ALIKE = ("falcon_mqa", "t5", "qwen3", "phi3", "bloom", "bert")


def twice(family: Traced) -> tuple[Plan, Plan, nn.Module]:
    """Two plans and the model that both of them leave."""
    first = sir.plan(family.program, ratio=0.1, kinds=kinds_of(family), importance="random")
    once = sir.shear(family.model, first)
    program = sir.trace(once)
    second = sir.plan(program, ratio=0.12, kinds=kinds_of(family), importance="random", seed=1)
    return first, second, sir.shear(once, second)


@pytest.mark.parametrize("name", [*SEVERAL, *(pytest.param(name, marks=pytest.mark.thorough) for name in ALIKE)])
def test_pruning_twice_is_pruning_once_by_the_joined_plan(name: str) -> None:
    family = traced(name)
    first, second, small = twice(family)
    joined = first.then(second)
    assert joined.ratio > first.ratio
    report = sir.verify(family.model, small, joined)
    assert report.sound
    assert report.moved > 0.01
    for straight in (sir.shear(family.model, joined), family.sheared_graph(joined)):
        assert {n: p.shape for n, p in straight.named_parameters()} == {
            n: p.shape for n, p in small.named_parameters() if n in dict(straight.named_parameters())
        }
        assert sir.verify(family.model, straight, joined).sound
    assert small.shear_record.plan.to_json() == joined.to_json()


@pytest.mark.parametrize(
    "name", ["llama_gqa", "bert", "phi3", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gpt2", "t5"))]
)
def test_uneven_layers_are_saved_loaded_and_pruned_again(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    family = trace(model)
    kinds = kinds_of(family)
    # Other shares in other layers: the first group of each kind loses more than the second.
    gone = {g: range(1 + g.size // (3 + 3 * place)) for kind in kinds for place, g in enumerate(family.able(kind)[:2])}
    gone = {g: lost for g, lost in gone.items() if len(lost) < g.size}
    first = family.without(gone)
    once = sir.shear(model, first)
    saved = sir.save(once, tmp_path / "once")
    assert not saved.stock
    loaded = sir.load(saved.path)
    assert same(outputs(loaded, family.feed), outputs(once, family.feed))
    program = sir.trace(loaded)
    second = sir.plan(program, ratio=0.05, kinds=["ffn"], allocation="isomorphic")
    small = sir.shear(loaded, second)
    assert sir.verify(model, small, first.then(second)).sound
    again = sir.load(sir.save(small, tmp_path / "twice").path)
    assert same(outputs(again, family.feed), outputs(small, family.feed))


@pytest.mark.parametrize(
    "name", ["llama_gqa", "gpt2", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("qwen3", "bart"))]
)
def test_layers_that_compete_end_up_uneven_and_sound(name: str, tmp_path: Path) -> None:
    family = traced(name)
    plan = sir.plan(family.program, ratio=0.3, kinds=kinds_of(family), allocation="isomorphic")
    left = {kind: {len(c.kept) for c in plan.cuts if c.kind == kind} for kind in kinds_of(family)}
    assert any(len(counts) > 1 for counts in left.values())
    small = sir.shear(family.model, plan)
    for each in (small, family.sheared_graph(plan)):
        assert sir.verify(family.model, each, plan).sound
    assert same(outputs(sir.load(sir.save(small, tmp_path / "out").path), family.feed), outputs(small, family.feed))
