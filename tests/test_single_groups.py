"""Every group of every family on its own: one unit goes, then half of them."""

from __future__ import annotations

import pytest

import shear_ir as sir
from shear_passes.analysis.find_groups import Group
from tests.roads import Traced, traced, units
from tests.zoo import FAMILIES

WHOLE = ("ffn", "kv_head", "query_group", "conv_channel")
ALONE = ("mlp", "resnet", "llama_gqa", "gpt2", "vit")
"""Families of which each is tried by default; group by group the others take minutes, and are thorough."""
NAMES = [name if name in ALONE else pytest.param(name, marks=pytest.mark.thorough) for name in FAMILIES]
# What the modules of one model may share in a single attribute, so that one layer cannot change alone.
SHARED = ("head_dim", "rotary_pair")


def ends(family: Traced, kind: str) -> list[Group]:
    """The first and the last group of this kind."""
    able = family.able(kind)
    return list(dict.fromkeys([*able[:1], *able[-1:]]))


@pytest.mark.parametrize("name", NAMES)
def test_any_group_of_the_first_and_last_layer_goes_alone_in_the_graph(name: str) -> None:
    family = traced(name)
    tried = outermost(family)
    assert tried
    moved = [_checked(family, group, share) for group in tried for share in (0.0, 0.5)]
    assert max(moved) > 0.05


def outermost(family: Traced) -> list[Group]:
    return [g for kind in (*WHOLE, *SHARED) for g in ends(family, kind)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_other_group_goes_alone_in_the_graph(name: str) -> None:
    family = traced(name)
    tried = outermost(family)
    for group in family.groups:
        if group.prunable and group.size > 1 and group not in tried:
            for share in (0.0, 0.5):
                _checked(family, group, share)


def _checked(family: Traced, group: Group, share: float) -> float:
    plan = family.without({group: units(group, share)})
    report = family.report(family.graph(plan), plan)
    assert report.sound, f"{group.name}: {report}"
    return report.moved


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_last_layers_heads_or_channels_go_alone_in_the_modules(name: str) -> None:
    family = traced(name)
    for kind in WHOLE:
        for group in ends(family, kind)[-1:]:
            _sound_or_refused(family, group, 0.5, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_unit_of_any_other_layers_heads_or_channels_goes_alone_in_the_modules(name: str) -> None:
    family = traced(name)
    for kind in WHOLE:
        for group in family.able(kind)[:-1]:
            _sound_or_refused(family, group, 0.0, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_head_channels_go_alone_in_the_modules_or_are_refused(name: str) -> None:
    family = traced(name)
    for kind in SHARED:
        for group in ends(family, kind):
            _sound_or_refused(family, group, 0.5, "use the graph backend")


def _sound_or_refused(family: Traced, group: Group, share: float, refusal: str | None) -> None:
    """The modules compute the masked function, or, where ``refusal`` says how, decline to."""
    plan = family.without({group: units(group, share)})
    try:
        small = sir.shear(family.model, plan)
    except sir.ShearingError as error:
        if refusal is None or refusal not in str(error):
            raise
        return
    report = family.report(small, plan)
    assert report.sound, f"{group.name}: {report}"
