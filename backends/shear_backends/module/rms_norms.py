"""RMS norms in the place of layer norms: what is exchanged in the modules, and kept with them for their record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shear_ir.errors import PlanError

_NAME = "shear_rms_norms"


@dataclass(frozen=True)
class RmsNorms:
    """``norms``: the eps of each module that has become an RMS norm. ``biases``: linear modules that got a bias."""

    norms: Mapping[str, float]
    biases: tuple[str, ...] = ()


def rms_norms_of(model: nn.Module) -> RmsNorms | None:
    """What was exchanged in ``model``; None where nothing was."""
    found = vars(model).get(_NAME)
    return found if isinstance(found, RmsNorms) else None


def exchange(model: nn.Module, made: RmsNorms, biases: Mapping[str, Tensor] | None = None) -> None:
    """Put RMS norms with scales of one in the place of layer norms of ``model``, and biases, zero where none are given.

    Raises ``PlanError`` where there is no such module.
    """
    for path, eps in made.norms.items():
        old = _module(model, path)
        weight = getattr(old, "weight", None)
        sizes = tuple(getattr(old, "normalized_shape", ())) or (() if weight is None else tuple(weight.shape))
        if len(sizes) != 1:
            raise PlanError(f"{path} of {type(model).__name__} is no layer norm over one dim")
        like = weight if weight is not None else next(model.parameters())
        norm = nn.RMSNorm(sizes, eps, device=like.device, dtype=like.dtype)
        norm.train(old.training)
        for owner in list(model.modules()):
            for name, child in list(owner.named_children()):
                if child is old:
                    setattr(owner, name, norm)
    for path in made.biases:
        linear = _module(model, path)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise PlanError(f"{path} of {type(model).__name__} is no linear module without a bias, and cannot get one")
        value = (biases or {}).get(path, torch.zeros_like(linear.weight[:, 0]))
        linear.bias = nn.Parameter(value.detach(), requires_grad=linear.weight.requires_grad)
    object.__setattr__(model, _NAME, made)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as failure:
        raise PlanError(f"{type(model).__name__} has no module {path}") from failure
