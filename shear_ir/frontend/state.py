"""What a trace of a model depends on beside its inputs: two equal states have one program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_MACHINERY = {*vars(nn.Module()), "training"}  # what every module has; modes are set for a trace


@dataclass(frozen=True, eq=False)
class ModelState:
    """Shapes, types and devices of all tensors; classes and plain attributes of all modules; numbers of the config."""

    tensors: Mapping[str, Any]
    modules: Mapping[str, Any]
    config: Any

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The state that ``model`` is in; linear in the number of its modules."""
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return cls(
            {name: (tuple(t.shape), t.dtype, t.device) for name, t in named},
            {path: (type(module), _attributes(module)) for path, module in model.named_modules()},
            _plain(getattr(model, "config", None), set()),
        )

    def __eq__(self, other: object) -> bool:
        mine = (self.tensors, self.modules, self.config)
        return isinstance(other, ModelState) and mine == (other.tensors, other.modules, other.config)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _plain(value, set()) for name, value in vars(module).items() if name not in _MACHINERY}


def _plain(value: Any, above: set[int]) -> Any:
    """``value`` as nested tuples of plain values; of anything else, what says whether it was exchanged for another."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) in above:
        return "..."
    inside = above | {id(value)}
    if isinstance(value, Mapping):
        return tuple((str(name), _plain(each, inside)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each, inside) for each in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_plain(each, inside) for each in value)
    if callable(getattr(value, "to_dict", None)) and not isinstance(value, nn.Module):  # a config
        return type(value), _plain(vars(value), inside) if not above else ()
    return getattr(value, "__qualname__", None) or type(value)
