"""Quantised models, whose packed weights have no rows and columns to cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_PACKING = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "aqlm", "hqq", "eetq")
"""Libraries whose layers hold packed weights, by the first part of their modules' names."""


def quantised_config(config: Mapping[str, Any]) -> str:
    """How a model folder's config says that its weights are packed, in words; empty when it does not."""
    packed = config.get("quantization_config")
    if not packed:
        return ""
    told = packed if isinstance(packed, Mapping) else {}
    bits = next((n for n in (4, 8) if told.get(f"load_in_{n}bit") or told.get("bits") == n), None)
    method = told.get("quant_method") or "quantization_config"
    return f"{method}, {bits} bits" if bits else str(method)


def quantised_module(model: nn.Module) -> str:
    """What in ``model`` is packed, in words; empty when nothing is."""
    for name, param in model.named_parameters():
        if not param.dtype.is_floating_point:
            return f"{name} holds {str(param.dtype).removeprefix('torch.')}"
    for path, module in model.named_modules():
        if type(module).__module__.split(".")[0] in _PACKING:
            return f"{path} is a {type(module).__module__}.{type(module).__name__}"
    for bits in (4, 8):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            return f"it was loaded in {bits} bits"
    return ""
