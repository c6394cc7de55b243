"""The oracle for users: a sheared model against the original whose removed units are masked to zero.

The reference is computed without the rewrite: it only knows which indices of which tensors go, and which tensors score
experts. An expert that is removed is never routed to: its scores are minus infinity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shear_backends.masked_blocks import MaskedBlocks, block_cuts
from shear_backends.never_routed import never_route
from shear_ir.axes import Indices
from shear_ir.errors import PlanError, UnsoundError
from shear_ir.frontend.adapters import find_adapters
from shear_ir.frontend.export import tensors_of
from shear_ir.frontend.feeds import call, tensors_in, with_tensors
from shear_ir.frontend.inputs import Inputs, as_inputs, device_of, example_inputs
from shear_ir.frontend.kept import forget_kept
from shear_ir.frontend.unchanged import copied
from shear_ir.plans import Kept, Plan
from shear_passes.rewrite.rescale_gains import gained, normed_dims

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Report:
    """``max_abs_diff`` over all outputs and inputs; ``scale``: the largest absolute entry of the reference.

    ``sound``: the difference is at most ``tolerance * max(1, scale)``, which fp32 rounding stays below.
    ``lengths``: the shapes of the main input that were tried. ``moved``: how far the pruned outputs are from the
    dense ones, which says that the test saw the cut at all.
    """

    max_abs_diff: float
    scale: float
    tolerance: float
    lengths: tuple[tuple[int, ...], ...]
    moved: float

    @property
    def sound(self) -> bool:
        """Whether the sheared model computes the masked original's function (NaN is never sound)."""
        return self.max_abs_diff <= self.tolerance * max(1.0, self.scale)

    def raise_if_unsound(self) -> None:
        """Raise ``UnsoundError`` with the measured difference unless the model is sound."""
        if not self.sound:
            raise UnsoundError(
                f"the sheared model differs from the masked original by {self.max_abs_diff:.3g} "
                f"(outputs up to {self.scale:.3g}, tolerance {self.tolerance:g})"
            )

    def __str__(self) -> str:
        verdict = "sound" if self.sound else "UNSOUND"
        tried = ", ".join("x".join(map(str, s)) for s in self.lengths)
        return f"{verdict}: max abs diff {self.max_abs_diff:.3g} on inputs {tried}"


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, inputs: Any = None, *, tolerance: float = TOLERANCE, seed: int = 0
) -> Report:
    """Compare ``small`` with ``model`` masked by ``plan`` on random inputs of two batch sizes and lengths.

    Removed slices are zero in the reference, and removed blocks add zero to their streams.

    ``inputs``: forward arguments to use instead, or a list of them. Raises ``PlanError`` when ``model`` is not the
    one the plan was made for, ``UnsoundError`` when its forward draws random numbers.
    """
    worst = scale = moved = 0.0
    with evaluation(model), evaluation(small), in_float32(model, small), torch.no_grad():
        feeds = _feeds(model, inputs, seed)
        reference = masked(model, plan.kept, plan.routers, plan.gains)
        without = MaskedBlocks(reference, plan.cuts) if block_cuts(plan.cuts) else None
        for feed in feeds:
            expected = without(feed) if without else run(reference, feed)
            found, dense = run(small, feed), run(model, feed)
            worst = _largest([worst, difference(expected, found)])
            moved = _largest([moved, difference(expected, dense)])
            scale = max([scale, *(float(t.abs().max()) for t in expected if t.numel())])
            if not worst <= tolerance * max(1.0, scale):
                _refuse_chance(model, feed, dense, tolerance)
    lengths = tuple(tuple(next(iter(tensors_in(f).values())).shape) for f in feeds)
    return Report(worst, scale, tolerance, lengths, moved)


def _refuse_chance(model: nn.Module, feed: Inputs, first: Sequence[Tensor], tolerance: float) -> None:
    """Raise ``UnsoundError`` where the model does not agree with itself, and so with nothing."""
    gap = difference(first, run(model, feed))
    if gap > tolerance:
        raise UnsoundError(
            f"{type(model).__name__} gives outputs that differ by {gap:.3g} when it reads one input twice: its forward "
            "draws random numbers, so nothing can be compared with it; pass what it draws as an input"
        )


def masked(
    model: nn.Module, kept: Kept, routers: Mapping[str, int] | None = None, gains: Mapping[str, str] | None = None
) -> nn.Module:
    """A copy of ``model`` in which every removed index of every tensor is zero; the other tensors are shared.

    ``routers``: tensors that score experts, with the dim that counts them; what they score the removed ones is minus
    infinity. ``gains``: what normalised weights are scaled by, see ``Plan``.
    """
    named = dict((*model.named_parameters(), *model.named_buffers()))
    missing = [name for name in kept if name not in named and not name.startswith(("c_", "lifted_"))]
    if missing:
        raise PlanError(f"the plan was made for another model: this one has no tensor {missing[0]}")
    tensors = gained(named, kept, gains or {})
    kept = _without_normed_rows(named, _without_dora_rows(model, kept), gains or {})
    memo: dict[int, Any] = {}
    for name, tensor in named.items():
        memo[id(tensor)] = _zeroed(name, tensors[name], kept[name]) if name in kept else tensors[name]
    reference = copied(model, memo)
    forget_kept(reference)
    astray = next((name for name, dim in (routers or {}).items() if dim not in kept.get(name, {})), None)
    if astray is not None:
        raise PlanError(f"the plan contradicts itself: it cuts no experts of the router {astray}")
    if routers:
        never_route(reference, {name: (dim, kept[name][dim]) for name, dim in routers.items()})
    return reference


def _without_dora_rows(model: nn.Module, kept: Kept) -> Kept:
    """``kept`` without the rows that a DoRA magnitude of zero removes: divided by their norm, zero would be 0/0."""
    spared: dict[str, int] = {}
    for adapter in find_adapters(model):
        if adapter.magnitude in kept and adapter.active and adapter.row_dim is not None:
            spared |= {adapter.base: adapter.row_dim, adapter.b: 0}
    return {n: {d: i for d, i in dims.items() if d != spared.get(n)} for n, dims in kept.items()}


def _without_normed_rows(tensors: Mapping[str, Tensor], kept: Kept, gains: Mapping[str, str]) -> Kept:
    """``kept`` without the rows of v that a zero of g removes from ``g * v / |v|``: zero would be 0/0 there."""
    spared = {v: set(kept.get(v, {})) - set(normed_dims(tensors[g], tensors[v])) for g, v in gains.items()}
    return {n: {d: i for d, i in dims.items() if d not in spared.get(n, ())} for n, dims in kept.items()}


def _zeroed(name: str, tensor: Tensor, dims: Mapping[int, Indices]) -> Tensor:
    zeroed = tensor.detach().clone()
    for dim, kept in dims.items():
        if dim >= tensor.dim() or (len(kept) and kept[-1] >= tensor.shape[dim]):
            raise PlanError(f"the plan was made for another model: {name} has shape {tuple(tensor.shape)}")
        gone = np.setdiff1d(np.arange(tensor.shape[dim]), kept)
        zeroed.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
    return nn.Parameter(zeroed, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeroed


def run(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """The tensors a model predicts with, caches off."""
    fixed = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return tensors_of(call(model, feed, **fixed))


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest absolute difference, infinite where shapes or counts differ; NaN stays NaN."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    pairs = ((x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.numel())
    # Where both are the same infinity they agree.
    return _largest([float(torch.where(x == y, 0.0, x - y).abs().max()) for x, y in pairs])


def _largest(gaps: Sequence[float]) -> float:
    """The largest, NaN when one is NaN: ``max`` would lose it."""
    return float(np.max(gaps, initial=0.0))


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Tensors of half precision as float32, so that functions are compared and not their rounding.

    The tensors themselves are put back at the end, bit for bit; one that two models share is converted once.
    """
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    halves = [(t, t.data) for t in tensors.values() if t.dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, half in halves:
            tensor.data = half.float()
        yield
    finally:
        for tensor, half in halves:
            tensor.data = half


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, every module's mode restored at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _feeds(model: nn.Module, inputs: Any, seed: int) -> list[Inputs]:
    if isinstance(inputs, list):
        return [_placed(model, as_inputs(model, one)) for one in inputs]
    if inputs is not None:
        return [_placed(model, as_inputs(model, inputs))]
    return [
        example_inputs(model, seed=seed),
        example_inputs(model, batch=2, length=16, seed=seed + 1),
    ]


def _placed(model: nn.Module, feed: Inputs) -> Inputs:
    halves = (torch.bfloat16, torch.float16)
    device = device_of(model)
    return with_tensors(feed, lambda t: t.to(device, torch.float32 if t.dtype in halves else t.dtype))
