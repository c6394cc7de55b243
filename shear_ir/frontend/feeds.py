"""Feeds: the arguments of one forward call by name, pytrees of tensors; their names in a graph, and their one owner.

Whoever needs inputs of a model asks ``inputs_of``: they are those that the model was given, or else made for it.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shear_ir.frontend.inputs import Inputs, as_inputs, device_of, example_inputs, float_dtype
from shear_ir.program import Feed

_given: weakref.WeakKeyDictionary[nn.Module, Feed] = weakref.WeakKeyDictionary()


def uncached(model: nn.Module) -> dict[str, Any]:
    """What a forward that could keep keys and values is told beside its inputs, so that it does not."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def call(model: nn.Module, feed: Mapping[str, Any], **fixed: Any) -> Any:
    """What ``model`` returns for ``feed``; arguments that have no name outside of forward are given by place."""
    parameters = inspect.signature(model.forward).parameters.values()
    spread = any(p.kind is p.VAR_POSITIONAL and p.name in feed for p in parameters)
    placed: list[Any] = []
    named = {**feed, **fixed}
    for p in parameters:
        if p.name not in named or p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD):
            continue
        if p.kind is p.VAR_POSITIONAL:
            placed.extend(named.pop(p.name))
        elif p.kind is p.POSITIONAL_ONLY or spread:
            placed.append(named.pop(p.name))
    return model(*placed, **named)


def tensors_in(feed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``feed`` by the names that a graph's inputs have: ``x``, or ``x_0`` for the first of a list."""
    found: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(dict(feed))[0]:
        if isinstance(leaf, Tensor):
            name = "_".join(re.sub(r"\W", "_", _part(key)) for key in path)
            while name in found or (len(path) > 1 and name in feed):
                name += "_"
            found[name] = leaf
    return found


def _part(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def with_tensors(feed: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> Inputs:
    """``feed`` with every tensor changed."""
    changed: Inputs = pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, dict(feed))
    return changed


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two feeds have the same structure, the same shapes and types of tensors, and the same other values."""
    return _kinds(a) == _kinds(b)


def _kinds(feed: Mapping[str, Any]) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten(dict(feed))
    return structure, *((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (type(v), v) for v in leaves)


def kept(model: nn.Module, feed: Mapping[str, Any]) -> Feed:
    """``feed`` to be kept: copies on the CPU, which ask for no gradient."""
    return Feed(with_tensors(feed, _copied), float_dtype(model))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def placed(feed: Feed, model: nn.Module) -> Inputs:
    """The feed for ``model`` as it is now: on its device, in its precision where they were in its precision then."""
    device, dtype = device_of(model), float_dtype(model)
    generator = torch.Generator().manual_seed(0)

    def place(tensor: Tensor) -> Tensor:
        if tensor.is_meta and device.type != "meta":  # there were never any values
            real = torch.zeros(tensor.shape, dtype=tensor.dtype)
            tensor = real.normal_(generator=generator) if real.is_floating_point() else real
        return tensor.to(device, dtype if tensor.dtype == feed.dtype else tensor.dtype, copy=True)

    return with_tensors(feed.values, place)


def remember(model: nn.Module, feed: Mapping[str, Any]) -> None:
    """Let ``feed``, which a user gave, be the inputs of ``model`` from now on."""
    _given[model] = kept(model, feed)


def given_inputs(model: nn.Module) -> Inputs | None:
    """The inputs that ``model`` was last given to be traced with, for it as it is now; None where there were none."""
    feed = _given.get(model)
    return None if feed is None else placed(feed, model)


def inputs_of(model: nn.Module, inputs: Any = None) -> Inputs:
    """The inputs to run ``model`` with: ``inputs``, else those that it was traced with, else examples made for it."""
    if inputs is not None:
        return as_inputs(model, inputs)
    found = given_inputs(model)
    return example_inputs(model) if found is None else found
