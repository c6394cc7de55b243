"""A clean room: whatever a model's own code writes while shear-ir runs it is put back, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_FOREIGN = {*sys.stdlib_module_names, "torch"}  # whose objects are no state of a model
_DEPTH = 4  # of plain objects within a module's attributes: a config within a config, a table within a helper
_SMALL = 2**16  # elements of a parameter that is not trained, which may be a counter


@contextlib.contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Inside, ``models`` may be run and traced; at the end their attributes, buffers and modes are what they were.

    Parameters that are trained are not copied: they are put back as objects, and no forward writes to them.
    """
    seen: set[int] = set()
    restore = [put_back for model in models for put_back in _snapshots(model, seen)]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _snapshots(model: nn.Module, seen: set[int]) -> Iterator[Callable[[], None]]:
    for module in model.modules():
        yield from _of_object(module, seen, _DEPTH)


def _of_object(owner: Any, seen: set[int], depth: int) -> Iterator[Callable[[], None]]:
    """What puts back the attributes of ``owner``, and what they hold, but for other modules, which have their turn."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    state = vars(owner)
    before = dict(state)

    def put_back() -> None:
        if state.keys() != before.keys() or any(state[name] is not value for name, value in before.items()):
            state.clear()
            state.update(before)

    yield put_back
    for value in before.values():
        yield from _of_value(value, seen, depth)


def _of_value(value: Any, seen: set[int], depth: int) -> Iterator[Callable[[], None]]:
    if isinstance(value, Tensor):
        trained = isinstance(value, nn.Parameter) and (value.requires_grad or value.numel() > _SMALL)
        told = not value.is_meta and not isinstance(value, FakeTensor)  # the others hold no numbers
        if not trained and told and id(value) not in seen:
            seen.add(id(value))
            yield _of_tensor(value)
        return
    if depth == 0 or isinstance(value, (nn.Module, type)) or callable(value):
        return
    if isinstance(value, (dict, list, set, deque)):
        if id(value) not in seen:
            seen.add(id(value))
            yield _of_container(value)
            for each in list(value.values()) if isinstance(value, dict) else list(value):
                yield from _of_value(each, seen, depth - 1)
    elif isinstance(value, tuple):
        for each in value:
            yield from _of_value(each, seen, depth - 1)
    elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _FOREIGN:
        yield from _of_object(value, seen, depth - 1)


def _of_container(value: Any) -> Callable[[], None]:
    before = copy.copy(value)

    def put_back() -> None:
        if _differs(value, before):
            value.clear()
            value.extend(before) if isinstance(value, (list, deque)) else value.update(before)

    return put_back


def _differs(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return True
    if isinstance(now, dict):
        return any(a != b or now[a] is not before[b] for a, b in zip(now, before, strict=True))
    return any(a is not b for a, b in zip(now, before, strict=True))


def _of_tensor(tensor: Tensor) -> Callable[[], None]:
    version, values = tensor._version, tensor.detach().clone()

    def put_back() -> None:
        # No version shows what was written through ``.data``.
        if tensor._version != version or not torch.equal(tensor, values):
            tensor.data.copy_(values)

    return put_back


def copied(model: nn.Module, tensors: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``model`` in which the tensors of some ids are others, as in ``copy.deepcopy(model, memo)``.

    What modules keep of a forward pass, which autograd knows how it came about, is copied as a plain tensor; buffers
    are never shared, for a forward pass may write to them.
    """
    memo: dict[int, Any] = dict(tensors or {})
    for module in model.modules():
        for value in vars(module).values():
            for kept in _made_tensors(value, _DEPTH):
                memo.setdefault(id(kept), kept.detach().clone())
    for buffer in model.buffers():
        if memo.get(id(buffer)) is buffer and not buffer.is_meta:
            memo[id(buffer)] = buffer.detach().clone()
    made: nn.Module = copy.deepcopy(model, memo)
    return made


def _made_tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in a plain attribute that are results of operators: ``deepcopy`` refuses them."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif depth and isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _made_tensors(each, depth - 1)
