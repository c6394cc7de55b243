"""Saliency: every criterion against the slices of one unit cut out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_training.saliency import SALIENCIES, saliency, sums
from shear_training.units import Units
from tests.training.tiny import adapted, base_groups
from tests.zoo import build


@pytest.fixture(scope="module")
def units() -> Units:
    model = adapted(init_lora_weights=False, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    return Units(model, [g for g in base_groups() if g.kind in ("ffn", "kv_head")])


def by_hand(units: Units, layer: int, head: int | None, channel: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """W and D of one unit as flat vectors: kv head with its four query heads of six channels, or an MLP channel."""
    prefix = f"base_model.model.model.layers.{layer}."
    rows = {"q_proj": 24, "k_proj": 6, "v_proj": 6} if head is not None else {"gate_proj": 1, "up_proj": 1}
    columns = {"o_proj": 24} if head is not None else {"down_proj": 1}
    owner = f"{prefix}self_attn." if head is not None else f"{prefix}mlp."
    unit = head if head is not None else channel
    assert unit is not None
    weights, deltas = [], []
    for name, width in {**rows, **columns}.items():
        module = units.model.get_submodule(owner + name)
        adapted_ = hasattr(module, "base_layer")
        weight = module.base_layer.weight if adapted_ else module.weight  # type: ignore[union-attr]
        delta = module.get_delta_weight("default") if adapted_ else torch.zeros_like(weight)  # type: ignore[operator, arg-type]
        span = slice(unit * width, (unit + 1) * width)
        for source, found in ((weight, weights), (delta, deltas)):
            found.append((source[span] if name in rows else source[:, span]).detach().flatten())  # type: ignore[index]
    return torch.cat(weights), torch.cat(deltas)


@pytest.mark.parametrize(("group", "unit"), [("ffn0", 5), ("ffn1", 43), ("kv0", 1), ("kv1", 0)])
def test_the_criteria_are_their_formulas(units: Units, group: str, unit: int) -> None:
    (owner,) = [g for g in units.groups if g.name == group]
    is_head = owner.kind == "kv_head"
    w, d = by_hand(units, int(group[-1]), unit if is_head else None, None if is_head else unit)
    number = units.starts[owner] + unit
    expected = {
        "magnitude": w.norm(),
        "average_magnitude": w.norm() / len(w),
        "cosine": w @ d / (w.norm() * d.norm()) + 1,
        "first_order": (w @ d).abs(),
        "second_order": (w @ d) ** 2 / 2,
    }
    found = sums(units)
    for name, value in expected.items():
        torch.testing.assert_close(SALIENCIES[name](found)[number], value, rtol=1e-4, atol=1e-6)


def test_each_criterion_has_norm_one_over_the_units_of_a_kind(units: Units) -> None:
    for name in SALIENCIES:
        score = saliency(units, {name: 1.0})
        for numbers in units.kinds().values():
            torch.testing.assert_close(score[numbers].norm(), torch.tensor(1.0))


def test_before_any_training_the_score_is_magnitude() -> None:
    fresh = Units(adapted(), [g for g in base_groups() if g.kind == "ffn"])
    torch.testing.assert_close(saliency(fresh, {"first_order": 1.0}), saliency(fresh, {"magnitude": 1.0}))


def test_scores_that_were_measured_count_by_their_names_and_alone_before_any_training() -> None:
    groups = [g for g in base_groups() if g.kind == "ffn"]
    measured = {"taylor": {g: np.arange(g.size, dtype=np.float64)[::-1].copy() for g in groups}}
    fresh, trained = Units(adapted(), groups), Units(adapted(init_lora_weights=False), groups)
    alone = saliency(trained, {"taylor": 1.0}, measured)
    expected = torch.cat([torch.arange(g.size).flip(0).float() for g in groups])
    torch.testing.assert_close(alone, expected / expected.norm())
    torch.testing.assert_close(saliency(fresh, {"taylor": 2.0, "cosine": 1.0}, measured), 2 * alone)
    both = saliency(trained, {"taylor": 2.0, "cosine": 1.0}, measured)
    torch.testing.assert_close(both, 2 * alone + saliency(trained, {"cosine": 1.0}))


def test_a_unit_that_is_never_to_go_weighs_not_on_the_others_and_large_scores_are_scores() -> None:
    groups = [g for g in base_groups() if g.kind == "ffn"]
    rising = {g: np.arange(1.0, 1.0 + g.size) + place / 2 for place, g in enumerate(groups)}
    units = Units(adapted(init_lora_weights=False), groups)
    plain = saliency(units, {"mine": 1.0}, {"mine": rising})
    for factor in (1e39, 1e-200):
        torch.testing.assert_close(
            saliency(units, {"mine": 1.0}, {"mine": {g: s * factor for g, s in rising.items()}}), plain
        )
    kept = {g: np.where(np.arange(g.size) == 3, np.inf, s) for g, s in rising.items()}
    found = saliency(units, {"mine": 1.0, "cosine": 1.0}, {"mine": kept})
    numbers = [units.starts[g] + 3 for g in groups]
    assert found[numbers].tolist() == [np.inf] * len(groups)
    order = saliency(units, {"mine": 1.0}, {"mine": kept}).argsort()
    assert order.tolist()[: -len(groups)] == [n for n in plain.argsort().tolist() if n not in numbers]


def test_a_criterion_of_no_weight_is_none() -> None:
    groups = [g for g in base_groups() if g.kind == "ffn"]
    fresh = Units(adapted(), groups)
    infinite = {"mine": {g: np.full(g.size, np.inf) for g in groups}}
    found = saliency(fresh, {"magnitude": 1.0, "mine": 0.0}, infinite)
    torch.testing.assert_close(found, saliency(fresh, {"magnitude": 1.0}))


def test_scores_of_another_trace_of_the_model_are_found_by_name(units: Units) -> None:
    scores = sir.scores(sir.trace(build("llama_gqa")), "magnitude-l1")
    assert len(saliency(units, {"magnitude-l1": 1.0}, scores)) == units.count
    one = {"magnitude-l1": {g: s for g, s in scores["magnitude-l1"].items() if g.name == "ffn0"}}
    with pytest.raises(PlanError, match="scores say nothing of kv0: pass those of this model"):
        saliency(units, {"magnitude-l1": 1.0}, one)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"taylor": 1.0}, "no saliency criterion 'taylor'"),
        ({"cosine": -1.0}, "from 0 up"),
        ({"cosine": 0.0}, "has a weight"),
    ],
)
def test_a_wrong_criterion_is_refused(units: Units, weights: dict[str, float], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        saliency(units, weights)
