"""PEFT models on families of the zoo, with adapters that look trained: no factor of theirs is zero."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

import shear_ir as sir
from shear_ir.plans import Plan
from tests.zoo import FAMILIES


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    """A config with sizes that no family has; ``targets``: modules, none of them for target_parameters."""
    return peft.LoraConfig(
        **{"r": 6, "lora_alpha": 7, "target_modules": list(targets), "init_lora_weights": False} | options
    )


def adapted(base: str | nn.Module, *targets: str, **options: Any) -> Any:
    """A PEFT model in evaluation mode whose copies, magnitudes and biases moved away from where they started."""
    torch.manual_seed(0)
    model = FAMILIES[base]() if isinstance(base, str) else base
    model = peft.get_peft_model(model, lora(*targets, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "magnitude" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model.eval()


def some(model: nn.Module, *kinds: str, ratio: float = 0.2, **options: Any) -> Plan:
    """A plan that removes random units."""
    return sir.plan(sir.trace(model), ratio=ratio, kinds=kinds or ("ffn", "kv_head"), importance="random", **options)
