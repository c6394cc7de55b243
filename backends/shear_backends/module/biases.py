"""Zero biases for consumers that have none, where the model's config class has a field for them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shear_backends.module.config_builds import built_shapes
from shear_ir.errors import PlanError
from shear_ir.frontend.unchanged import copied
from shear_ir.paths import split


def with_biases(model: nn.Module, weights: Collection[str]) -> nn.Module:
    """A copy of ``model`` in which each of the parameters ``weights`` has a bias beside it, zero where it is new.

    The function stays. Which fields of the config add which biases is found by building the class on the meta device
    with each of its switches turned on. Raises ``PlanError`` where no switch gives a weight a bias.
    """
    have = dict(model.named_parameters())
    wanted = {_bias(name) for name in weights} - have.keys()
    if not wanted:
        return model
    config = copy.deepcopy(getattr(model, "config", None))
    added: dict[str, tuple[int, ...]] = {}
    for path in _switches(config):
        more = _added(model, config, path)
        if more.keys() & (wanted - added.keys()):
            _set(config, path)
            added |= more
    missing = sorted(wanted - added.keys())
    if missing:
        raise PlanError(
            f"the config of {type(model).__name__} has no switch that gives {missing[0].removesuffix('.bias')} a bias"
        )
    made: Any = copied(model)
    made.config = config
    for name, shape in added.items():
        owner, leaf = split(name)
        module = made.get_submodule(owner)
        like = next(module.parameters())
        setattr(module, leaf, nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device)))
    return made  # type: ignore[no-any-return]


def _bias(weight: str) -> str:
    return f"{weight.rpartition('.')[0]}.bias"


def _switches(config: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the fields that are off, those of configs inside of the config too."""
    for name, value in sorted(vars(config).items()) if config is not None else []:
        if value is False and not name.startswith("_"):
            yield *above, name
        elif hasattr(value, "to_dict"):
            yield from _switches(value, (*above, name))


def _added(model: nn.Module, config: Any, path: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
    """The parameters that turning a switch on adds, none where it does anything else to the shapes."""
    other = copy.deepcopy(config)
    _set(other, path)
    kind = type(model)
    before, after = built_shapes(kind, copy.deepcopy(config)), built_shapes(kind, other)
    if before is None or after is None or any(after.get(name) != shape for name, shape in before.items()):
        return {}
    return {name: after[name] for name in after.keys() - before.keys() if name.endswith(".bias")}


def _set(config: Any, path: tuple[str, ...]) -> None:
    for name in path[:-1]:
        config = getattr(config, name)
    setattr(config, path[-1], True)
