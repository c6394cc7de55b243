"""The oracle for users: a sheared model against the original whose removed units are masked to zero.

The reference is computed without the rewrite: it only knows which indices of which tensors go, and which tensors score
experts. An expert that is removed is never routed to: its scores are minus infinity.

Both are computed in float64, where a right model differs from the reference in the last places only. How much rounding
may explain is not a constant: it is the rounding of the reference itself in the model's own precision, measured, and
carried over to float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from shear_backends.verify.compare import Gap, compared, difference, largest, largest_of, worst_of
from shear_backends.verify.never_routed import never_route
from shear_backends.verify.precision import unit_of
from shear_backends.verify.sides import Nudge, Side, gone_of, without_divisions
from shear_backends.verify.stored import recomputed
from shear_backends.verify.structure import Structure
from shear_backends.verify.tried import Question, longer, past_guards, resized, run, trials
from shear_ir.axes import Indices
from shear_ir.errors import PlanError, ShearError, UnsoundError
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.kept import forget_kept
from shear_ir.frontend.unchanged import copied
from shear_ir.plans import Kept, Plan
from shear_passes.rewrite.rescale_gains import gained

__all__ = ["Report", "difference", "evaluation", "masked", "run", "verify"]

_SAME = 1e-9
"""Of the largest output, in float64: far above rounding, far below what chance does."""
_ASKED = 4.0
"""How far two models that are asked in two ways, with a cache and without, may be apart, in what one is from itself."""


@dataclass(frozen=True)
class Report:
    """``max_abs_diff`` over all outputs and inputs, in float64; ``scale``: the largest absolute entry of the reference.

    ``gap``, ``noise``, ``bound``, ``place``: the one tensor that rounding explains least: how far the models are apart
    there in float64, how far the reference is from itself in the model's own precision, the difference that this
    rounding explains in float64, and where it is. ``sound``: the gap is at most the bound. ``lengths``: the shapes of
    the main input that were tried; ``notes``: what was tried beside them, or could not be. ``moved``: how far the
    pruned outputs are from the dense ones, which says that the test saw the cut at all. ``structure``: what the
    programs of both say, by a proof that knows nothing of these numbers; None where they were not compared.
    """

    max_abs_diff: float
    scale: float
    lengths: tuple[tuple[int, ...], ...]
    moved: float
    gap: float = 0.0
    noise: float = 0.0
    bound: float = 0.0
    place: str = ""
    notes: tuple[str, ...] = ()
    structure: Structure | None = None

    @property
    def judge(self) -> Literal["numbers", "structure"]:
        """What decides: equal programs at every length where numbers do not speak against it, else the numbers."""
        return "structure" if self.sound and self.structure is not None and self.structure.equal else "numbers"

    @property
    def sound(self) -> bool:
        """Whether the sheared model computes the masked original's function (NaN is never sound)."""
        return self.gap <= self.bound

    def _told(self, structure: Structure) -> str:
        if structure.equal and not self.sound:
            return f"{structure}, so that forward has another way there"
        return f"by structure: {structure}"

    def raise_if_unsound(self) -> None:
        """Raise ``UnsoundError`` with the measured difference unless the model is sound."""
        if not self.sound:
            raise UnsoundError(
                f"the sheared model differs from the masked original by {self.gap:.3g} in float64 at {self.place}, "
                f"where rounding explains {self.bound:.2g} (outputs up to {self.scale:.3g})"
            )

    def __str__(self) -> str:
        verdict = "sound" if self.sound else "UNSOUND"
        tried = ", ".join([*("x".join(map(str, s)) for s in self.lengths), *self.notes])
        return (
            f"{verdict}: max abs diff {self.max_abs_diff:.3g} in float64 on inputs {tried}; rounding explains "
            f"{self.bound:.2g} (the model's own in its precision: {self.noise:.2g})"
            + ("" if self.structure is None else f"; {self._told(self.structure)}")
        )


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, inputs: Any = None, *, seed: int = 0, more: bool = False
) -> Report:
    """Compare ``small`` with ``model`` masked by ``plan``, in float64, on random inputs of several sizes.

    Removed slices are zero in the reference, and removed blocks add zero to their streams. Neither model is changed
    or copied.

    ``inputs``: forward arguments to use instead, or a list of them; with ``more``, those of one call, which are tried
    in other sizes too, as far as the model takes them and a graph is not of fixed sizes. Raises ``PlanError`` when
    ``model`` is not the one the plan was made for, ``UnsoundError`` when its forward draws random numbers.
    """
    with evaluation(model), evaluation(small):
        comparison = _Comparison(model, small, plan)
        for trial in trials(model, inputs, seed):
            comparison.further(trial) if trial.further else comparison.ask(trial)
        if inputs is None:
            # The first of those that the model takes.
            comparison.ask_first(longer(model, tuple(comparison.sizes), seed))
        elif more:
            for trial in resized(model, inputs):
                comparison.further(trial) if trial.further else comparison.ask_first([trial])
        if inputs is None or more:
            for told, asked in past_guards(model, comparison.feeds):
                if not comparison.ask_first(asked):
                    comparison.notes.append(told)
    return comparison.report()


class _Comparison:
    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan) -> None:
        self.dense, self.reference, self.small = Side.of(model), Side.masked(model, plan), Side.of(small)
        anew = recomputed(model, small, plan)
        self.small.values = anew.values
        self.nudge: Nudge | None = (anew.others, anew.steps) if anew else None
        floats = [p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
        self.unit = min(map(unit_of, floats), default=unit_of(torch.float32))
        self.gaps: list[Gap] = []
        self.notes: list[str] = []
        self.sizes: list[tuple[int, ...]] = []
        self.feeds: list[Inputs] = []
        self.moved = self.scale = self.most = 0.0

    def report(self) -> Report:
        """What was found so far."""
        worst = worst_of(self.gaps)
        return Report(
            self.most, self.scale, tuple(self.sizes), self.moved, worst.value, worst.noise, worst.bound, worst.place,
            tuple(self.notes),
        )  # fmt: skip

    def ask(self, trial: Question) -> None:
        """Compare what both say to one input; raises ``PlanError`` where the dense model says nothing."""
        try:
            expected = self._exact(self.reference, trial)
        except ShearError:
            raise
        except Exception as failure:  # in the model's own words
            raise PlanError(
                f"{type(self.dense.model).__name__} does not run on inputs {trial.name}: {_line(failure)}"
            ) from failure
        self._compare(trial, expected)
        self._count(trial)

    def ask_first(self, asked: Iterable[Question]) -> bool:
        """Compare what both say to the first of these inputs that they take, if there is one."""
        before = len(self.notes)
        answered = any(map(self._answered, asked))
        if answered:
            del self.notes[before:]
        return answered

    def _count(self, trial: Question) -> None:
        self.sizes.append(trial.size)
        self.feeds.append(trial.feed)

    def _answered(self, trial: Question) -> bool:
        try:
            expected = self._exact(self.reference, trial)
            self._compare(trial, expected)
        except UnsoundError:
            raise
        except Exception as failure:  # too long for its positions, in the model's own words
            self.notes.append(f"not tried: {trial.name} ({_line(failure)})")
            return False
        self._count(trial)
        return True

    def further(self, trial: Question) -> None:
        """Compare what modules say to another way of asking, where the dense model itself stands by what it says."""
        blocks = self.reference.blocks is not None and trial.call is not run
        if isinstance(self.small.model, fx.GraphModule) or blocks:
            return
        own = self._own_gap(trial)
        if own is None:
            return
        self._compare(trial, self._exact(self.reference, trial), own)
        self.notes.append(f"and {trial.name}")

    def _own_gap(self, trial: Question) -> float | None:
        """How far the dense model is from itself when it is asked so; None where it does not stand by what it says."""
        with torch.random.fork_rng([]):
            try:
                torch.manual_seed(1)
                first = self._exact(self.dense, trial)
                torch.manual_seed(2)
                again = self.dense.ask(trial.small or trial.call, trial.feed, torch.float64)
            except Exception:  # it has no cache, or cannot be trained so
                return None
        gap = difference(first, again)
        return gap if gap <= _SAME * largest(first) else None

    def _compare(self, trial: Question, expected: Sequence[Tensor], own: float = 0.0) -> None:
        place = trial.name if trial.further else f"inputs {trial.name}"
        try:
            found = self._found(trial)
        except ShearError:
            raise
        except Exception as failure:
            self.gaps.append(Gap(f"{place}, where it raises {_line(failure)}", math.inf, 0.0, 0.0, 0.0))
            self.most = math.inf
            return
        nudged = self._found(trial, self.nudge) if self.nudge else None
        rounded, unit = self._rounded(trial, expected)
        gaps = compared(place, expected, found, rounded, nudged, unit)
        gaps = [replace(gap, bound=max(gap.bound, _ASKED * own)) for gap in gaps]
        if not trial.further:
            dense = self._exact(self.dense, trial)
            if not all(gap.sound for gap in gaps):
                self._refuse_chance(trial, dense)
            self.moved = largest_of([self.moved, difference(expected, dense)])
        self.gaps += gaps
        self.most = largest_of([self.most, *(gap.value for gap in gaps)])
        self.scale = max([self.scale, *(gap.scale for gap in gaps)])

    def _found(self, trial: Question, nudge: Nudge | None = None) -> tuple[Tensor, ...]:
        return self.small.ask(trial.small or trial.call, trial.feed, torch.float64, nudge)

    def _exact(self, side: Side, trial: Question) -> tuple[Tensor, ...]:
        return side.ask(trial.call, trial.feed, torch.float64)

    def _rounded(self, trial: Question, expected: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], float]:
        """The reference in the model's own precision, and its rounding; in float32 where that does not run."""
        for dtype, unit in ((None, self.unit), (torch.float32, unit_of(torch.float32))):
            try:
                found = self.reference.ask(trial.call, trial.feed, dtype)
            except Exception:  # whatever the model's code raises for lack of a kernel
                continue
            if math.isfinite(difference(expected, found)):
                return found, unit
        return (), self.unit

    def _refuse_chance(self, trial: Question, first: Sequence[Tensor]) -> None:
        """Raise ``UnsoundError`` where the model does not agree with itself, and so with nothing."""
        again = self._exact(self.dense, trial)
        gap = difference(first, again)
        if gap > _SAME * largest(first):
            raise UnsoundError(
                f"{type(self.dense.model).__name__} gives outputs that differ by {gap:.3g} when it reads one input "
                "twice: its forward draws random numbers, so nothing can be compared with it; pass what it draws as an "
                "input"
            )


def _line(failure: Exception) -> str:
    text = str(failure).splitlines()
    return f"{type(failure).__name__}: {text[0]}" if text else type(failure).__name__


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
    kept = without_divisions(model, kept, gains or {})
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


def _zeroed(name: str, tensor: Tensor, dims: Mapping[int, Indices]) -> Tensor:
    zeroed = tensor.detach().clone()
    for dim, kept in dims.items():
        zeroed.index_fill_(dim, gone_of(name, tensor, dim, kept), 0)
    return nn.Parameter(zeroed, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeroed


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
