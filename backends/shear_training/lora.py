"""Adapters for recovery: put on every linear projection, written and read bit for bit, merged in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shear_ir.errors import PlanError
from shear_ir.frontend.adapters import find_adapters
from shear_ir.reading import Unreadable, require_regular

_NAME = "default"


def attach(model: nn.Module, *, rank: int, alpha: float, dropout: float, seed: int) -> PeftModel:
    """``model`` with fresh adapters on all linear projections but the output head; the base is frozen.

    What is linear is known by its class, not by its name. Raises ``PlanError`` where nothing is, and for a model that
    has adapters already, or none that needs so high a rank.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise PlanError("this model has adapters already: merge them before it is recovered")
    targets = linear_names(model)
    if not targets:
        raise PlanError("this model has no linear projection, so there is nothing to put an adapter on")
    require_rank(model, rank, "the rank of the adapters")
    # PEFT takes any number, whatever its annotation says.
    scale: Any = alpha
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = get_peft_model(model, config)
    # A name would have PEFT ask the hub about the base model at every checkpoint.
    made.peft_config[_NAME].base_model_name_or_path = None
    return made  # type: ignore[no-any-return]


def require_rank(model: nn.Module, rank: int, what: str) -> None:
    """Raise ``PlanError`` for a ``rank``, called ``what``, that no product of two matrices on ``model`` can have."""
    weights = (model.get_parameter(f"{name}.weight") for name in linear_names(model))
    highest = max((min(weight.shape) for weight in weights), default=rank)
    if rank > highest:
        raise PlanError(f"{what} is {rank}, and no projection of the model has more than {highest}: give a lower rank")


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear projections of ``model``, without the one that gives the logits."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name
    ]  # fmt: skip


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: nn.Module, path: Path) -> None:
    """Write the adapters to ``path``, whole or not at all."""
    beside = path.with_name(f".{path.name}")
    save_file({n: t.detach().contiguous().cpu() for n, t in adapter_tensors(model).items()}, beside)
    os.replace(beside, path)


def load_adapter(model: nn.Module, path: Path) -> None:
    """Read what ``save_adapter`` wrote; raises ``PlanError`` where it does not fit."""
    try:
        require_regular(path)
        tensors: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, Unreadable) as failure:
        raise PlanError(f"{path} cannot be read: {failure}") from failure
    into = adapter_tensors(model)
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in into.items()}:
        raise PlanError(f"{path} holds the adapter of another model")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])


def finite(model: nn.Module) -> bool:
    """Whether every number of the adapters is one."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in adapter_tensors(model).values())


def detach(model: PeftModel, *, merge: bool) -> nn.Module:
    """The model below the adapters, the same object as before; ``merge``: their product is added in float32."""
    if merge:
        with torch.no_grad():
            for adapter in find_adapters(model):
                if adapter.active:
                    weight = adapter.weight
                    weight.copy_(weight.float() + adapter.delta())
    return model.unload()  # type: ignore[no-any-return]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what adapters and Trainer change besides weights: which parameters are trained, and the cache."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
        if use_cache is not None:
            config.use_cache = use_cache
