"""LHSPG over a base in half precision: what adapters learn is not rounded away where a merge would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shear_ir as sir
from shear_training.lhspg import LHSPG
from shear_training.schedule import Periods
from tests.training.tiny import step, trained

ASSETS = Path(__file__).resolve().parents[2] / "tools" / "assets"


def half(folder: Path, ffn: int) -> tuple[nn.Module, LHSPG, torch.optim.Optimizer]:
    """The documented recipe but for its length: bf16, rank 8, a rate of 3e-4; ``ffn`` channels of each layer go."""
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    groups = sir.groups(sir.trace(base))
    targets = {g.name: ffn for g in groups if g.kind == "ffn"}
    targets |= {g.name: 1 for g in groups if g.kind == "kv_head"}
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    inside = torch.optim.AdamW(trained(model), lr=3e-4, weight_decay=0.0)
    return model, LHSPG(inside, model, groups, targets, Periods(warmup=2, count=2, steps=20)), inside


def effective(optimizer: LHSPG, important: Tensor) -> list[Tensor]:
    """What the model computes with at the places of the units that stay, in float64."""
    assert optimizer.units is not None
    found = []
    for place in optimizer.units.places:
        weight = place.tensor.detach().double() + sum(adapter.delta().double() for adapter in place.adapters)
        found.append(weight.index_select(place.dim, important[place.owner].nonzero().flatten()))
    return found


def learned(optimizer: LHSPG, important: Tensor, base: list[Tensor]) -> Tensor:
    now = effective(optimizer, important)
    return torch.stack([(a - b).norm() for a, b in zip(now, base, strict=True)]).norm()


def moved_by_the_merge(folder: Path, ffn: int, ids: Tensor) -> float:
    """How far the end of the first period moves the function, over what was learned until then."""
    model, optimizer, inside = half(folder, ffn)
    seen: list[list[Tensor]] = []
    for _ in range(21):
        step(model, optimizer, ids)
    important = ~optimizer.redundant
    handle = inside.register_step_post_hook(lambda *_: seen.append(effective(optimizer, important)))
    assert optimizer.units is not None
    base = [
        p.tensor.detach().double().index_select(p.dim, important[p.owner].nonzero().flatten())
        for p in optimizer.units.places
    ]
    step(model, optimizer, ids)
    handle.remove()
    assert optimizer.periods.ends(optimizer.step_count - 1)
    (before,) = seen
    update = torch.stack([(a - b).norm() for a, b in zip(before, base, strict=True)]).norm()
    assert float(update) > 0.0
    return float(learned(optimizer, important, before) / update)


def test_the_end_of_a_period_moves_the_function_by_less_than_a_fiftieth_of_what_was_learned() -> None:
    ids = torch.randint(3, 2000, (4, 24), generator=torch.Generator().manual_seed(1))
    assert moved_by_the_merge(ASSETS / "tiny-llama", 30, ids) < 0.02


@pytest.mark.real
def test_nor_does_it_on_a_real_model(smollm2_bf16: Path) -> None:
    ids = torch.randint(3, 40000, (2, 24), generator=torch.Generator().manual_seed(1))
    assert moved_by_the_merge(smollm2_bf16, 30, ids) < 0.02
