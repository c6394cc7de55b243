"""What is read again after a model was written, compared with that model: tensors bit for bit, modules by settings.

Modules of one class with equal settings, over equal tensors, compute one function: nothing has to be run. Tensors are
read from the files a few at a time, so that a comparison needs no second model in memory.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from shear_backends.graph.module import named_tensors
from shear_ir.paths import split

_HELD = 64 * 2**20
"""How many bytes of a file are read before its mapping is given back."""

# What a config tells of its writer and reader rather than of the model.
_OF_THE_READER = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map",
    "_attn_implementation", "_experts_implementation", "attn_implementation", "experts_implementation",
    "_attn_implementation_internal", "_experts_implementation_internal", "_commit_hash", "_from_model_config",
})  # fmt: skip
_MACHINERY = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What loading leaves on a model beside its settings.
_NOTES = frozenset({
    "name_or_path", "warnings_issued", "_is_hf_initialized", "shear_record", "peft_config", "_is_full_backward_hook",
    "_loss_function", "_model_tags", "_use_kernels", "_weight_conversions",
})  # fmt: skip


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module; a parametrisation, such as a weight norm, gives each its own below it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same precision; NaN is NaN. They may be on two devices."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


def casts(model: nn.Module, again: nn.Module) -> dict[str, str]:
    """Computed buffers that ``model`` holds in another precision than ``again``, whose class just made them."""
    found: dict[str, str] = {}
    for name, (mine, made) in _computed(model, again).items():
        if mine.dtype != made.dtype and mine.is_floating_point() and made.is_floating_point():
            found[name] = str(mine.dtype).removeprefix("torch.")
    return found


def cast(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Give computed buffers the precision that ``casts`` found."""
    for name, kind in kinds.items():
        path, leaf = split(name)
        buffers = model.get_submodule(path)._buffers
        if (made := buffers.get(leaf)) is not None:
            buffers[leaf] = made.to(getattr(torch, kind))


def different_shapes(model: nn.Module, again: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes in ``model`` of those tensors that have another one in ``again``."""
    theirs = named_tensors(again)
    return {
        name: tuple(tensor.shape)
        for name, tensor in named_tensors(model).items()
        if name in theirs and theirs[name].shape != tensor.shape
    }


def different_tensor(model: nn.Module, again: nn.Module, files: Mapping[Path, frozenset[str]]) -> str:
    """What tells the tensors of ``again`` from those of ``model``, the first that does; empty when nothing does.

    ``again`` may hold its parameters on the meta device where ``files`` hold their numbers under the same names.
    A computed buffer that one of them has alone is among the settings: what remains of layers that were taken out.
    """
    mine, theirs = named_tensors(model), named_tensors(again)
    alone = mine.keys() ^ theirs.keys()
    for own, whose in ((mine, model), (theirs, again)):
        for name in alone.intersection(_never_saved(whose)):
            own.pop(name, None)
    for name in mine.keys() - theirs.keys():
        return f"there is no place for {name}"
    for name in theirs.keys() - mine.keys():
        return f"this model has no {name}"
    for name, tensor in mine.items():
        if theirs[name].shape != tensor.shape:
            return f"{name} would be {list(theirs[name].shape)} and is {list(tensor.shape)}"
        if theirs[name].dtype != tensor.dtype:
            return f"{name} would be {_kind(theirs[name])} and is {_kind(tensor)}"
    if (apart := _shared_otherwise(mine, theirs)) is not None:
        return f"{apart[0]} and {apart[1]} are one tensor in one of the two models, and two in the other"
    left = {identity(tensor): name for name, tensor in reversed(mine.items())}
    for name, tensor in read_tensors(files):
        if name not in mine or identity(mine[name]) not in left:
            continue
        if not same_bits(mine[name], tensor) or not _begins_alike(mine[name], theirs[name]):
            return f"{name} has other numbers"
        del left[identity(mine[name])]
    for name in left.values():
        if theirs[name].is_meta:
            return f"no file holds {name}"
        if not same_bits(mine[name], theirs[name]):
            return f"{name} has other numbers"
    return ""


def said_setting(settings: Mapping[str, list[str]], model: nn.Module, again: nn.Module) -> str:
    """One of the ``settings`` that are not alike, in words."""
    path, (name, *_) = next(iter(settings.items()))
    place = path or type(model).__name__
    mine, theirs = (getattr(dict(of.named_modules()).get(path), name, None) for of in (model, again))
    if hasattr(mine, "to_dict") and hasattr(theirs, "to_dict"):
        one, two = plain(mine), plain(theirs)
        field = next(key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key))
        name, mine, theirs = f"{name}.{field}", one.get(field), two.get(field)
    told = all(isinstance(value, (int, float, str, tuple, list, type(None))) for value in (mine, theirs))
    return f"{place}.{name} is {mine!r} and would be {theirs!r}" if told else f"{place}.{name} would be another one"


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON values, without what it tells of its writer and reader; empty for none."""
    if not hasattr(config, "to_dict"):
        return {}
    document = json.loads(json.dumps(config.to_dict(), default=str))
    return _without_reader(document)  # type: ignore[no-any-return]


def different_settings(model: nn.Module, again: nn.Module) -> dict[str, list[str]]:
    """What modules have, beside tensors, that is not alike in ``again``: attributes by path.

    A module that is of another class has ``__class__`` in its list, one that is in one of the models alone as well; a
    module with other hooks has their dictionaries, and one with buffers of other names ``_buffers``.
    """
    mine, theirs = dict(model.named_modules()), dict(again.named_modules())
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys((*mine, *theirs)):
        if path not in mine or path not in theirs or class_of(mine[path]) is not class_of(theirs[path]):
            found[path] = ["__class__"]
        elif names := list(_different(mine[path], theirs[path])):
            found[path] = names
    return found


def _different(mine: nn.Module, theirs: nn.Module) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    one, two = vars(mine), vars(theirs)
    for name in sorted((one.keys() | two.keys()) - _MACHINERY - _NOTES):
        if name in ("config", "generation_config") and hasattr(one.get(name), "to_dict"):
            if plain(one[name]) != plain(two.get(name)):
                yield name
        elif not _alike(one.get(name), two.get(name), seen):
            yield name
    if one["_buffers"].keys() != two["_buffers"].keys():
        yield "_buffers"
    for hooks in _HOOKS:
        kinds = [sorted(type(hook).__qualname__ for hook in (of.get(hooks) or {}).values()) for of in (one, two)]
        if kinds[0] != kinds[1]:
            yield hooks


def _alike(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    """Whether two settings are the same to the code that reads them; False where that cannot be told."""
    if a is b or (id(a), id(b)) in seen:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.is_meta == b.is_meta and (a.is_meta or same_bits(a, b))
    if type(a) is not type(b):
        return False
    seen.add((id(a), id(b)))
    if isinstance(a, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)):
        return bool(a == b) or a != a  # a NaN is no other one
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], seen) for key in a)
    if isinstance(a, (set, frozenset)):
        return bool(a == b)
    if isinstance(a, nn.Module):  # those of the tree are compared at their places
        return class_of(a) is class_of(b)
    if hasattr(a, "to_dict"):
        return plain(a) == plain(b)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _alike(a.__self__, b.__self__, seen)
    if isinstance(a, functools.partial):
        return all(_alike(x, y, seen) for x, y in ((a.func, b.func), (a.args, b.args), (a.keywords, b.keywords)))
    if isinstance(getattr(a, "__dict__", None), dict) and not isinstance(a, types.FunctionType):
        return _alike(vars(a), vars(b), seen)
    return False


def _without_reader(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _without_reader(value) for name, value in document.items() if name not in _OF_THE_READER}
    return [_without_reader(value) for value in document] if isinstance(document, list) else document


def _computed(model: nn.Module, again: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The buffers of ``model`` that no file holds, each with that of ``again``."""
    modules = dict(again.named_modules())
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            mine, made = module._buffers.get(leaf), modules[path]._buffers.get(leaf) if path in modules else None
            if mine is not None and made is not None:
                found[f"{path}.{leaf}" if path else leaf] = mine, made
    return found


def _never_saved(model: nn.Module) -> set[str]:
    """The names of the buffers that no file holds."""
    return {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in module._non_persistent_buffers_set
    }


def _shared_otherwise(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two names of which only one model says that they are one tensor."""
    for one, other in ((mine, theirs), (theirs, mine)):
        first: dict[Any, str] = {}
        for name, tensor in one.items():
            known = first.setdefault(identity(tensor), name)
            if identity(other[known]) != identity(other[name]):
                return known, name
    return None


def identity(tensor: Tensor) -> Any:
    """What two names of one tensor have in common: tied ones are one object, or two that see one memory alike."""
    if tensor.is_meta or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as a file can hold them: no two see one memory, as a buffer may see a part of a parameter."""
    found: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.detach().clone() if memory in held else tensor.detach().contiguous()
        held.add(memory)
    return found


def _begins_alike(mine: Tensor, theirs: Tensor) -> bool:
    """Whether a loaded tensor is what its file holds, as far as its first numbers tell; it is not read further."""
    few = 16
    return theirs.is_meta or same_bits(mine.detach().flatten()[:few], theirs.detach().flatten()[:few])


def read_tensors(files: Mapping[Path, frozenset[str]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, of which only few are in memory at a time."""
    for path, names in files.items():
        left = sorted(names)
        while left:
            read = 0
            with safe_open(path, "pt") as file:
                while left and read < _HELD:
                    name = left.pop()
                    tensor = file.get_tensor(name)
                    read += tensor.numel() * tensor.element_size()
                    yield name, tensor


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
