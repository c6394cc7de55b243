"""The base of a PEFT model: its own names beside those in the PEFT model, itself without adapters, its digest."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shear_ir.frontend.unchanged import copied
from shear_ir.paths import split

Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class BaseView:
    """The base's names of its modules and tensors to their names in the PEFT model.

    The first name is that of the base's own; further ones are those of the copies that adapters trained
    (``modules_to_save``). For a model without adapters each name stands for itself.
    """

    modules: Names
    tensors: Names


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` holds layers of PEFT, active or not."""
    if "peft" not in sys.modules:  # then nothing of it can be inside
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel) or any(_wrapped(module) is not None for module in model.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what runs it on several devices or compiled: the module that owns its parameters' names.

    Raises ``TypeError`` for what is no module.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"a model is a torch.nn.Module, not {what}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):  # torch.compile
            model = inner
        else:
            return model


def base_view(model: nn.Module) -> BaseView:
    """The names of the base of ``model``."""
    modules: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, tuple[str, ...]] = {}
    for base_path, paths, module in _walk(((root_path(model), _root(model)),), ""):
        modules[base_path] = paths
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[_join(base_path, leaf)] = tuple(_join(path, leaf) for path in paths)
    return BaseView(modules, tensors)


def plain_base(model: nn.Module) -> nn.Module:
    """The base of ``model`` without adapters, of its own class; it shares every tensor with ``model``."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    base = copied(_root(model), memo)
    for path, _, module in list(_walk((("", base),), "")):
        above, child = split(path)
        if path and base.get_submodule(above)._modules[child] is not module:
            setattr(base.get_submodule(above), child, module)
    # What PEFT leaves on the model itself would make others take it for adapted.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(base).pop(name, None)
    return base


def base_digest(model: nn.Module) -> str:
    """Names and shapes of the base's saved tensors as a short hash, the same with adapters and without."""
    state = model.state_dict()
    names = {base: name for base, (name, *_) in base_view(model).tensors.items()}
    return shapes_digest({base: tuple(state[name].shape) for base, name in names.items() if name in state})


def shapes_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """``sha256`` of ``name:2x3`` lines in the order of the names, the first 16 hex digits."""
    lines = (f"{name}:{'x'.join(map(str, shape))}\n" for name, shape in sorted(shapes.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def root_path(model: nn.Module) -> str:
    """The path of the base model within ``model``."""
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return "base_model.model"
    return ""


def _root(model: nn.Module) -> nn.Module:
    return model.get_submodule(root_path(model))


_Places = tuple[tuple[str, nn.Module], ...]


def _walk(places: _Places, base_path: str) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """Each module of the base: its path there, its paths here, and itself."""
    while (inner := _wrapped(places[0][1])) is not None:
        path, wrapper = places[0]
        copies = [(f"modules_to_save.{name}", module) for name, module in _copies(wrapper).items()]
        places = tuple((_join(path, leaf), module) for leaf, module in (inner, *copies))
    yield base_path, tuple(path for path, _ in places), places[0][1]
    for name, child in list(places[0][1]._modules.items()):
        if child is not None:
            below = ((_join(path, name), module._modules.get(name)) for path, module in places)
            yield from _walk(tuple((p, m) for p, m in below if m is not None), _join(base_path, name))


def _wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The module of the base that a module of PEFT stands for, with its name there; None for any other module."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer) and isinstance(module.base_layer, nn.Module):
        return "base_layer", module.base_layer
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "original_module", module.original_module
    return None


def _copies(wrapper: nn.Module) -> Mapping[str, nn.Module]:
    copies = wrapper._modules.get("modules_to_save")
    return dict(copies.items()) if isinstance(copies, nn.ModuleDict) else {}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
