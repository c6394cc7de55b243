"""A tiny Llama with adapters, and a loop that trains it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_passes.analysis.find_groups import Groups
from shear_training.lhspg import LHSPG
from shear_training.schedule import Periods
from tests.zoo import FAMILIES

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def adapted(family: str = "llama_gqa", targets: Sequence[str] = ATTENTION + MLP, **options: Any) -> peft.PeftModel:
    """A family with fresh adapters on ``targets``."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)
    made = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(made, peft.PeftModel)
    return made


def tokens(batch: int = 4, length: int = 13) -> Tensor:
    """The same ids every time."""
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(7))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def lhspg(model: nn.Module, targets: dict[str, int], periods: Periods, lr: float = 1e-2, **options: Any) -> LHSPG:
    """LHSPG over AdamW on the adapters of ``model``."""
    inside = torch.optim.AdamW(trained(model), lr=lr)
    return LHSPG(inside, model, base_groups(), targets, periods, **options)


@functools.cache
def base_groups(family: str = "llama_gqa") -> Groups:
    """The groups of a family without adapters, which are those of any model adapted from it."""
    return groups_of(FAMILIES[family]())


def groups_of(model: nn.Module) -> Groups:
    return sir.groups(sir.trace(model))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor | None = None) -> float:
    """One step of training on ``ids``."""
    ids = tokens() if ids is None else ids
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def logits(model: nn.Module, length: int = 12) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, length)).logits  # type: ignore[no-any-return]
