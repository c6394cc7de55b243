"""The two sides of a comparison: the masked original and the sheared model, each in the precision that is asked for.

Neither is copied: masks and precision are applied to what operators read, so that no more than the tensors of one
operator (of one module, where its code asks for the types of its parameters) are in float64 at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shear_backends.verify.masked_blocks import MaskedBlocks, block_cuts
from shear_backends.verify.never_routed import routing_by, split
from shear_backends.verify.precision import Fill, FillsByTensor, InPrecision, bare_copy
from shear_ir.errors import PlanError
from shear_ir.frontend.adapters import find_adapters
from shear_ir.frontend.feeds import with_tensors
from shear_ir.frontend.inputs import Inputs
from shear_ir.plans import Kept, Plan
from shear_passes.rewrite.rescale_gains import gained, normed_dims

Call = Callable[[nn.Module, Inputs], Sequence[Tensor]]
"""A way to ask a model, such as all at once or with a cache."""

Nudge = tuple[Mapping[int, Tensor], Mapping[int, float]]
"""Other values of some tensors, and the relative steps by which others are moved."""

_MOST_SWAPPED = 16  # kinds of modules of one model whose code looks at the types of its parameters


@dataclass
class Side:
    """A model, how its tensors read (``masks``, ``values``), and those by which experts are not chosen (``matrices``).

    ``blocks``: what adds zero for the blocks that are gone. ``swapped``: classes of modules whose parameters are
    converted as a whole while they run, found as they are needed.
    """

    model: nn.Module
    masks: FillsByTensor = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)
    matrices: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: MaskedBlocks | None = None
    swapped: set[type[nn.Module]] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> Side:
        """``model`` as it is."""
        return cls(bare_copy(model))

    @classmethod
    def masked(cls, model: nn.Module, plan: Plan) -> Side:
        """``model`` without what ``plan`` removes; raises ``PlanError`` for a plan of another model."""
        bare = bare_copy(model)
        masks = _fills(bare, without_divisions(bare, plan.kept, plan.gains))
        astray = next((name for name, dim in plan.routers.items() if dim not in plan.kept.get(name, {})), None)
        if astray is not None:
            raise PlanError(f"the plan contradicts itself: it cuts no experts of the router {astray}")
        routers = {name: (dim, plan.kept[name][dim]) for name, dim in plan.routers.items()}
        scores, matrices = split(bare, routers)
        for tensor, dim, gone in scores:
            masks.setdefault(id(tensor), []).append(Fill(dim, gone, -float("inf")))
        blocks = MaskedBlocks(bare, plan.cuts) if block_cuts(plan.cuts) else None
        return cls(bare, masks, _gains(bare, plan), matrices, blocks)

    def ask(
        self, call: Call, feed: Inputs, dtype: torch.dtype | None, nudged: Nudge | None = None
    ) -> tuple[Tensor, ...]:
        """What it answers when every operator computes in ``dtype``, or in the model's own where it is None."""
        asked = self.model
        if self.blocks is not None:
            asked = self.blocks.graph_of(feed)  # which traces, and must not do so in another precision
            call = _by_name
        while True:
            try:
                with self._reading(asked, dtype, nudged):
                    return tuple(call(asked, raised(feed, dtype)))
            except Exception:
                kind = self._failing(asked, call, feed, dtype)
                if kind is None or kind in self.swapped or len(self.swapped) == _MOST_SWAPPED:
                    raise
                self.swapped.add(kind)

    @contextmanager
    def _reading(self, asked: nn.Module, dtype: torch.dtype | None, nudged: Nudge | None = None) -> Iterator[None]:
        # Before anything is on, since tensors are read in another precision then.
        own = {id(t): (t, t.data) for t in (*asked.parameters(), *asked.buffers())}
        with torch.no_grad(), warnings.catch_warnings(), ExitStack() as stack:
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # both are raised after it
            values, steps = nudged or (self.values, {})
            stack.enter_context(InPrecision(dtype, self.model, self.masks, values, steps))
            # After the precision, so that it is asked first and knows the tensors by themselves.
            stack.enter_context(routing_by(self.matrices) if self.matrices else nullcontext())
            stack.enter_context(_swapping(asked, tuple(self.swapped), own))
            yield

    def _failing(self, asked: nn.Module, call: Call, feed: Inputs, dtype: torch.dtype | None) -> type[nn.Module] | None:
        """The class of the innermost module in which it fails; None for one without tensors."""
        running: list[nn.Module] = []
        hooks = []
        for module in asked.modules():
            hooks.append(module.register_forward_pre_hook(lambda m, _: running.append(m)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
        try:
            with self._reading(asked, dtype):
                call(asked, raised(feed, dtype))
        except Exception:
            return next((type(m) for m in reversed(running) if next(m.parameters(), None) is not None), None)
        finally:
            for hook in hooks:
                hook.remove()
        return None


def _by_name(graph: nn.Module, feed: Inputs) -> Sequence[Tensor]:
    return tuple(graph(**feed))


def raised(feed: Inputs, dtype: torch.dtype | None) -> Inputs:
    """``feed`` with what has a lower precision in ``dtype``."""

    def change(tensor: Tensor) -> Tensor:
        low = dtype is not None and tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
        return tensor.to(dtype) if low else tensor

    return with_tensors(feed, change)


@contextmanager
def _swapping(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], own: Mapping[int, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """While modules of these classes run, their tensors are what operators would read, and ``own`` again afterwards."""

    def enter(module: nn.Module, args: Any) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.detach()

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = own[id(tensor)][1]

    hooks: list[Any] = []
    for module in model.modules():
        if kinds and isinstance(module, kinds):
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, data in own.values():
            if kinds:
                tensor.data = data


def without_divisions(model: nn.Module, kept: Kept, gains: Mapping[str, str]) -> Kept:
    """``kept`` without the rows that a zero beside them removes: divided by their norm, zero would be 0/0.

    That is a DoRA magnitude, and the g of ``g * v / |v|``.
    """
    spared: dict[str, set[int]] = {}
    for adapter in find_adapters(model):
        if adapter.magnitude in kept and adapter.active and adapter.row_dim is not None:
            spared |= {adapter.base: {adapter.row_dim}, adapter.b: {0}}
    named = _named(model)
    spared |= {v: set(kept.get(v, {})) - set(normed_dims(named[g], named[v])) for g, v in gains.items()}
    return {n: {d: i for d, i in dims.items() if d not in spared.get(n, ())} for n, dims in kept.items()}


def _gains(model: nn.Module, plan: Plan) -> dict[int, Tensor]:
    """What the gains of normalised weights read as where their norms become smaller, in float64."""
    named = _named(model)
    exact = {name: named[name].detach().double() for pair in plan.gains.items() for name in pair}
    found = gained(exact, plan.kept, plan.gains)
    return {id(named[g]): found[g] for g in plan.gains}


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def _fills(model: nn.Module, kept: Kept) -> dict[int, list[Fill]]:
    """What a plan removes of each tensor; raises ``PlanError`` for tensors that the model does not have."""
    named = _named(model)
    missing = [name for name in kept if name not in named and not name.startswith(("c_", "lifted_"))]
    if missing:
        raise PlanError(f"the plan was made for another model: this one has no tensor {missing[0]}")
    fills: dict[int, list[Fill]] = {}
    for name, dims in kept.items():
        if name in named and id(named[name]) not in fills:
            fills[id(named[name])] = [Fill(d, gone_of(name, named[name], d, stay)) for d, stay in dims.items()]
    return fills


def gone_of(name: str, tensor: Tensor, dim: int, kept: Any) -> Tensor:
    """The indices of ``tensor`` along ``dim`` that are not in ``kept``; raises ``PlanError`` where it has no such."""
    if dim >= tensor.dim() or (len(kept) and kept[-1] >= tensor.shape[dim]):
        raise PlanError(f"the plan was made for another model: {name} has shape {tuple(tensor.shape)}")
    return torch.from_numpy(np.setdiff1d(np.arange(tensor.shape[dim]), kept)).to(tensor.device)
