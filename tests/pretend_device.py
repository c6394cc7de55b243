"""A pretend accelerator that computes on the CPU and is as strict about devices as a real one.

Its tensors are wrappers around tensors of the CPU. Every operator goes through one place that refuses tensors of two
devices, as CUDA does, and counts what makes the host wait. There are two such devices, ``pretend:0`` and ``pretend:1``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
NAME = "pretend"

_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor, aten._unsafe_index_put.default)  # fmt: skip
"""Operators that take indices on the CPU."""

_WAITED_FOR = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
               aten._unique2.default, aten.unique_consecutive.default)  # fmt: skip
"""Operators whose result the host needs before it can go on."""


class TwoDevicesError(RuntimeError):
    """An operator was given tensors of two devices."""


@dataclass
class Pretend:
    """``first`` and ``second``: the devices; ``syncs``: what the host waited for, by operator."""

    first: torch.device = field(default_factory=lambda: torch.device(NAME, 0))
    second: torch.device = field(default_factory=lambda: torch.device(NAME, 1))
    syncs: Counter[str] = field(default_factory=Counter)


_now: list[Pretend] = []


class PretendTensor(Tensor):
    """A tensor of a pretend device; ``elem`` has its values."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, device: torch.device, requires_grad: bool = False) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device=device, requires_grad=requires_grad,
        )  # fmt: skip
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self.elem}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = PretendTensor(self.elem.detach().clone(), self.device).requires_grad_(self.requires_grad)
            made.__dict__ |= {name: value for name, value in vars(self).items() if name not in ("elem", "grad")}
            memo[id(self)] = made
        return memo[id(self)]  # type: ignore[no-any-return]

    # Of a wrapper, torch would set what describes it and leave the values.
    @property
    def data(self) -> PretendTensor:  # type: ignore[override]
        return PretendTensor(self.elem.detach(), self.device)

    @data.setter
    def data(self, value: PretendTensor) -> None:
        if value.shape != self.shape or value.device != self.device or value.dtype != self.dtype:
            raise TwoDevicesError(f"{self.dtype} on {self.device} cannot become {value.dtype} on {value.device} here")
        self.elem = value.elem

    # Who holds memory in common can be asked of any device.
    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()


_RealGenerator = torch.Generator


class _Generator(_RealGenerator):
    """A generator of a pretend device."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> Any:
        place = torch.device(device)
        if place.type != NAME:
            return _RealGenerator(place)
        made = super().__new__(cls)
        made.place = _numbered(place)
        return made

    def __init__(self, device: Any = "cpu") -> None: ...


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class has no types
    """Operators that have no tensor of a pretend device yet: those that make one, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # While a model is traced there are only shapes, for whose devices torch's own mode sees to.
        if _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):  # type: ignore[no-untyped-call]  # torch's own class has no types
    """Functions that reach for memory below any dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # Below, torch hands out another object for the same generator.
        if (generator := kwargs.get("generator")) is not None:
            _require_generator(func, generator, args, kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_pretend(kwargs.get("device")):
            device = kwargs.pop("device")
            wants = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(device).requires_grad_(wants)
        return func(*args, **kwargs)


@contextmanager
def pretend_device() -> Iterator[Pretend]:
    """The devices are there within; modules moved to them keep their parameters, as they do on a real one."""
    _register()
    made = Pretend()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as undo:
        undo.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        undo.callback(setattr, torch, "Generator", _RealGenerator)
        undo.callback(_now.remove, made)
        _now.append(made)
        torch.__future__.set_swap_module_params_on_conversion(True)
        # Torch refuses to swap what tracing has looked at, though on a real device nothing is swapped at all.
        undo.callback(setattr, torch.utils, "weakref", torch.utils.weakref)
        torch.utils.weakref = SimpleNamespace(getweakrefs=lambda tensor: [])
        torch.Generator = _Generator  # type: ignore[misc]
        undo.enter_context(_Dispatch())  # type: ignore[no-untyped-call]
        undo.enter_context(_Functions())  # type: ignore[no-untyped-call]
        yield made


class _Module(_DummyBackendModule):
    """What torch asks of ``torch.pretend``, of which there is none in other tests of the process."""

    def is_available(self) -> bool:
        return bool(_now)

    def device_count(self) -> int:
        return 2

    def synchronize(self, device: Any = None) -> None: ...


class _Hooks(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return bool(_now)


@cache
def _register() -> None:
    """Once per process: torch forgets no device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks())


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One operator: on the values, where all of its tensors are on one device."""
    if func is aten._to_copy.default:
        return _copied(args[0], dict(kwargs))
    if func is aten.copy_.default:
        return _copied_into(*args)
    if func is aten._pin_memory.default:
        return args[0]
    leaves = tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
    device = _one_device(func, args, leaves, here)
    if here and (func in _WAITED_FOR or (func in _INDEXED and _has_masks(args[1]))):
        _count(func)
    asked = kwargs.get("device")
    if asked is not None:
        device = _numbered(asked) if _is_pretend(asked) else None
        kwargs = {**kwargs, "device": torch.device("cpu") if device else asked}
    args, kwargs = tree_map(_values, args), tree_map(_values, dict(kwargs))
    if func is aten.histc.default and not args[0].is_floating_point():  # the CPU counts no whole numbers
        found = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    else:
        found = func(*args, **kwargs)
    if device is None:
        return found
    same = {id(leaf.elem): leaf for leaf in here}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else PretendTensor(value, device)

    return tree_map(wrapped, found)


def _one_device(func: Any, args: Any, leaves: list[Any], here: list[PretendTensor]) -> torch.device | None:
    """The pretend device of an operator, None where it has none; a number on the CPU goes with any."""
    # A number of a pretend device goes with no other, as on CUDA.
    indices = tree_leaves(args[1]) if func in _INDEXED else []
    places = {leaf.device for leaf in here}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and not any(leaf is index for index in indices):
            places.add(leaf.device)
    if len(places) > 1 and any(place.type == NAME for place in places):
        raise TwoDevicesError(f"{func} was given tensors of {', '.join(sorted(map(str, places)))}")
    return next((place for place in places if place.type == NAME), None)


def _require_generator(func: Any, generator: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    of = next((leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
    place = _numbered(kwargs.get("device") or of or "cpu")
    own = getattr(generator, "place", torch.device("cpu"))
    if own != place and NAME in (own.type, place.type):
        raise TwoDevicesError(f"{func} was given tensors of {', '.join(sorted(map(str, (own, place))))}")


def _copied(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    device = _numbered(kwargs.pop("device", None) or source.device)
    kwargs.pop("pin_memory", None)
    if device.type == "meta":
        return aten._to_copy.default(_values(source), device=device, **kwargs)
    if isinstance(source, PretendTensor) and device.type == "cpu":
        _count(aten._to_copy.default)
    made = aten._to_copy.default(_values(source), **kwargs)
    return PretendTensor(made, device) if device.type == NAME else made


def _copied_into(into: Tensor, source: Tensor, *_: Any) -> Tensor:
    if isinstance(source, PretendTensor) and into.device.type == "cpu":
        _count(aten.copy_.default)
    _values(into).copy_(_values(source))
    return into


def _has_masks(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(indices))


def _count(func: Any) -> None:
    for pretend in _now:
        pretend.syncs[func.name().removeprefix("aten::")] += 1


def _values(leaf: Any) -> Any:
    return leaf.elem if isinstance(leaf, PretendTensor) else leaf


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, 0) if device.type == NAME and device.index is None else device
