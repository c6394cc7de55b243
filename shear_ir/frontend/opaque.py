"""Modules that torch.export cannot look into, as one call each: ``shear_ir::opaque`` runs the module as it is.

Such a call has no axis rule, so everything it reads and makes is frozen, its parameters too; the rest of the model
stays prunable. The module itself is kept without weights: the call gets them as arguments.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from shear_ir.errors import TraceError
from shear_ir.frontend.unchanged import copied


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module as it was seen: its arguments and results, tensors by their place and shape.

    ``leaves``: arguments in order, None where there is a tensor; ``given``: the shapes of those tensors. ``made``:
    shape and dtype of each result that is a tensor, itself where it is none.
    """

    module: nn.Module
    weights: tuple[str, ...]
    leaves: tuple[Any, ...]
    given: tuple[tuple[int, ...], ...]
    arguments: Any
    made: tuple[Any, ...]
    results: Any

    def run(self, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """The module's own forward on other tensors and weights."""
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf.value for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.arguments)
        made = functional_call(self.module, dict(zip(self.weights, weights, strict=True)), args, kwargs)
        return [leaf.clone() for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]

    def shapes(self, tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """The shapes of the results; a size that an argument had, such as the length, is that of the argument now."""
        now: dict[int, Any] = {}
        for known, tensor in zip(self.given, tensors, strict=True):
            now |= {a: b for a, b in zip(known, tensor.shape, strict=True) if isinstance(b, torch.SymInt)}
        return [tuple(now.get(size, size) for size in m.shape) for m in self.made if isinstance(m, _Made)]


@dataclass(frozen=True)
class _Fixed:
    """An argument or a result that is no tensor."""

    value: Any


@dataclass(frozen=True)
class _Made:
    """A result that is a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


_calls: dict[str, _Call] = {}
_numbers = itertools.count()


@torch.library.custom_op("shear_ir::opaque", mutates_args=())
def opaque(key: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The results of the call ``key`` that are tensors."""
    return _calls[key].run(tensors, weights)


@opaque.register_fake
def _(key: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    like, call = (*tensors, *weights)[0], _calls[key]
    types = [m.dtype for m in call.made if isinstance(m, _Made)]
    return [like.new_empty(shape, dtype=t) for shape, t in zip(call.shapes(tensors), types, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    key, tensors, weights = inputs
    ctx.key, ctx.count = key, len(tensors)
    ctx.save_for_backward(*tensors, *weights)


def _backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[None, list[Tensor | None], list[Tensor | None]]:
    """The gradients of the module's own forward, which is run once more."""
    saved = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
    with torch.enable_grad():
        made = _calls[ctx.key].run(saved[: ctx.count], saved[ctx.count :])
    pairs = [(m, g) for m, g in zip(made, gradients, strict=True) if g is not None and m.requires_grad]
    wanted = [t for t in saved if t.requires_grad]
    found = iter(torch.autograd.grad([m for m, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    all_ = [next(found) if t.requires_grad else None for t in saved]
    return None, all_[: ctx.count], all_[ctx.count :]


opaque.register_autograd(_backward, setup_context=_keep)


@dataclass
class Opaque:
    """The modules of ``model`` that are not looked into, by class; ``calls`` are those seen on the example inputs."""

    model: nn.Module
    classes: tuple[type[nn.Module], ...]
    calls: dict[nn.Module, list[str]] = field(default_factory=dict)

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """The outermost modules of these classes."""
        found: list[tuple[str, nn.Module]] = []
        for path, module in self.model.named_modules():
            if isinstance(module, self.classes) and not any(path.startswith(f"{above}.") for above, _ in found):
                found.append((path, module))
        return found

    def share(self) -> float:
        """The share of the model's parameters that nothing could be removed from."""
        inside = {id(p): p.numel() for _, module in self.modules for p in module.parameters()}
        return sum(inside.values()) / max(1, sum(p.numel() for p in self.model.parameters()))

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, calls are run and remembered."""
        with contextlib.ExitStack() as stack:
            for path, module in self.modules:
                stack.enter_context(_forward(module, self._remember(path, module)))
            yield

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, each call is the one operator."""
        with contextlib.ExitStack() as stack:
            for _, module in self.modules:
                keys = iter(self.calls.get(module, ()))
                stack.enter_context(_forward(module, _as_operator(module, keys)))
            yield

    def _remember(self, path: str, module: nn.Module) -> Any:
        forward = module.forward

        def remember(*args: Any, **kwargs: Any) -> Any:
            leaves, arguments = pytree.tree_flatten((args, kwargs))
            tensors = [t for t in (*leaves, *_weights(module).values()) if isinstance(t, Tensor)]
            versions = [t._version for t in tensors]
            made = forward(*args, **kwargs)
            if [t._version for t in tensors] != versions:
                raise TraceError(f"{path} writes to what it reads")
            results, structure = pytree.tree_flatten(made)
            key = f"{path}:{next(_numbers)}"
            _calls[key] = _Call(
                _without_weights(module),
                tuple(_weights(module)),
                tuple(None if isinstance(leaf, Tensor) else _Fixed(leaf) for leaf in leaves),
                tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)),
                arguments,
                tuple(_Made(tuple(r.shape), r.dtype) if isinstance(r, Tensor) else _Fixed(r) for r in results),
                structure,
            )
            self.calls.setdefault(module, []).append(key)
            return made

        return remember


def _as_operator(module: nn.Module, keys: Iterator[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        key = next(keys)
        seen = _calls[key]
        leaves = pytree.tree_leaves((args, kwargs))
        if [isinstance(leaf, Tensor) for leaf in leaves] != [leaf is None for leaf in seen.leaves]:
            raise TraceError(f"{key} is given other arguments under torch.export")
        for leaf, known in zip(leaves, seen.leaves, strict=True):
            if isinstance(leaf, torch.SymInt | torch.SymBool | torch.SymFloat):
                raise TraceError(f"{key} is given a number that is read out of a tensor, {leaf} (here {known.value})")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        made = iter(opaque(key, tensors, list(_weights(module).values())))
        return pytree.tree_unflatten([next(made) if isinstance(m, _Made) else m.value for m in seen.made], seen.results)

    return call


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(), *module.named_buffers()))


def _without_weights(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in _weights(module).values():
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    bare = copied(module, memo)
    vars(bare).pop("forward", None)
    return bare
