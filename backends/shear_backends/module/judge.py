"""Whether modules compute what a sheared program says: by structure where that decides, else by numbers.

By structure (``structure.py``): the modules are traced, and their program is compared with the sheared one, call by
call; no weight is read. That is done at the lengths of the trace and once more past every number that a config or a
module holds, since a window, a bucket or a table of positions shows itself only there. Where programs differ, numbers
decide, in double precision and on weights drawn anew: whether two ways to compute are the same does not depend on the
weights, and small ones would hide what differs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from shear_backends.graph.module import graph_module, named_tensors
from shear_backends.verify.compare import largest
from shear_backends.verify.numbers import difference, evaluation, run
from shear_backends.verify.sides import Side, raised
from shear_backends.verify.sizes import apart, beyond, longer
from shear_backends.verify.structure import Structure, first_difference
from shear_ir.errors import PlanError, ShearError, ShearingError
from shear_ir.frontend.export import trace
from shear_ir.frontend.feeds import tensors_in
from shear_ir.frontend.guards import Guard, size_guards
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.unchanged import copied
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BLOCK_KINDS
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.rewrite.cuts import checked
from shear_passes.rewrite.raise_lora import raise_lora
from shear_passes.rewrite.shear import shear_program, shear_tensors

Maker = Callable[[nn.Module], nn.Module]
"""From dense modules to the sheared ones, over the tensors that the dense ones have."""
Traced = list[tuple[Inputs, Groups]]
"""Inputs, each with the groups of a trace on them."""

_GUARDS = 2
"""Conditions of forward that are traced on their other side."""

_ROUNDING = 1e-9
"""Of the largest output: double precision is a million times finer, and single precision a hundred times coarser."""
_SINGLE = 1e-5
"""The same where a part of the program computes in its own precision, whatever it is asked for."""
_FOLLOWS = 1e-6
"""Of what the cut changes: a difference that is not tiny beside it is one of the cut."""
_CLEARLY = 0.05
_AFFORDED = 512
"""Positions that attention is still run on, and not only traced."""


class Judge:
    """Compares candidates with the sheared program, which came about by another road.

    ``rescaled``: whether norms are, so that structure cannot decide. ``structure``: what it says of the latest
    candidate, ``accepted``: of the latest that was accepted. ``why``: what speaks against the first one, the likeliest.
    ``failed``: whether the latest one could not be run.
    """

    def __init__(self, model: nn.Module, groups: Groups, plan: Plan, feed: Inputs, *, rescaled: bool = False) -> None:
        self.model = model
        self.groups = groups
        self.plan = plan
        self.feed = feed
        self.rescaled = rescaled
        self.program: Program = shear_program(groups, plan)
        self.meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        self.structure = self.accepted = Structure(False)
        self.why = ""
        self.failed = False
        self._known: dict[tuple[int, bool], tuple[tuple[Tensor, ...], float, float]] = {}

    def agrees(self, small: nn.Module, made: Maker | None = None) -> bool:
        """Whether ``small`` computes the sheared program's function, at every length that is tried.

        ``made`` makes such modules of dense ones that hold other numbers, so that numbers can decide where programs
        differ; without it, and on the meta device, only structure does.
        """
        self.failed = False
        if self.rescaled and made is not None and not self.meta:
            return self._by_numbers(small, made)
        lengths = [_shape(self.feed)]
        against = self._against(small, self.feed, self.program)
        if not against and self.further is not None:
            feed, program = self.further
            lengths.append(_shape(feed))
            against = self._against(small, feed, program)
            against = f"with inputs of {_told(feed)}, {against}" if against else ""
        self.structure = Structure(not against, tuple(lengths), against)
        tell = len(lengths) == 1 and made is not None and not self.meta and not self.failed
        if not against or (tell and made is not None and self._same_numbers(made)):
            self.accepted = self.structure
            return True
        self.why = self.why or f" ({against})"
        return False

    def _by_numbers(self, small: nn.Module, made: Maker) -> bool:
        """Where a mean has become one over fewer channels: the graph scales it, and modules what it multiplies."""
        against = _failure(small, self.feed)
        self.failed = bool(against)
        self.structure = Structure(False, (), against or "the means of norms are scaled elsewhere")
        if against:
            self.why = self.why or f" ({against})"
            return False
        self._require_further()
        agreed = self._same_numbers(made)
        self.accepted = self.structure if agreed else self.accepted
        return agreed

    def _against(self, small: nn.Module, feed: Inputs, program: Program) -> str:
        """What speaks against ``small`` as ``program``."""
        if feed is self.feed and not self.meta:  # quicker than a trace of what does not run
            failure = _failure(small, self.feed)
            if failure:
                self.failed = True
                return failure
        try:
            return first_difference(program, raise_lora(trace(small, feed)))
        except ShearError as raised:
            return str(raised)

    def _require_further(self) -> None:
        """Raise ``ShearingError`` where the plan is not possible with longer inputs."""
        _ = self.further

    @cached_property
    def further(self) -> tuple[Inputs, Program] | None:
        """The longest inputs that can be traced, with the sheared program at that length; None where none differ.

        Raises ``ShearingError`` where the dense model takes another way there, in which the plan is not possible.
        """
        found = _further(self.model, self.groups, self.feed)
        for feed, there in (*found[:1], *_past_guards(self.model, self.groups, self.feed)):
            against = not_possible(there, self.plan)
            if against:
                raise ShearingError(
                    f"with inputs of {_told(feed)}, the forward of {type(self.model).__name__} takes another way than "
                    f"with {_told(self.feed)}, and there {against}: leave the group whole, or plan with such inputs"
                )
        return (found[0][0], shear_program(found[0][1], self.plan)) if found else None

    def _same_numbers(self, made: Maker) -> bool:
        """Whether the numbers agree in double precision, on weights drawn anew; on the model's own if those fail."""
        return all(self._same_on(place, made) for place in range(len(self._given)))

    @cached_property
    def _given(self) -> list[Inputs]:
        """What is asked where numbers decide."""
        other = apart(self.model, self.feed)
        feeds = [self.feed, *([] if other is None else [other])]
        return [*feeds, *itertools.islice(self._taken(longer(self.model, self.feed, _AFFORDED)), 1)]

    def _taken(self, feeds: Iterable[Inputs]) -> Iterator[Inputs]:
        """Those that the dense model takes: shapes alone do not say what lies past a table of positions."""
        return (feed for feed in feeds if not _failure(self.model, feed))

    def _same_on(self, place: int, made: Maker) -> bool:
        for draw in (True, False):
            try:
                expected, moved, bound = self._said(place, draw)
                found = _exactly(made(_in_double(self.model, draw)), raised(self._given[place], torch.float64))
                gap = difference(expected, found)
            except Exception as failure:  # code that minds its dtype, or a wrong candidate
                self.why = self.why or f" ({type(failure).__name__}: {failure})"
                continue
            scale = largest(expected)
            if bound <= _ROUNDING and moved not in (0.0, float("inf")):
                bound = min(bound * scale, _FOLLOWS * moved)
            else:
                bound *= scale
            if gap <= max(bound, 1e-13 * scale):
                return True
            self.why = self.why or f" (outputs differ by {gap:.3g}, up to {scale:.3g})"
            if scale == scale:  # else the drawn weights have no value, and the model's own may
                return False
        return False

    def _said(self, place: int, draw: bool) -> tuple[tuple[Tensor, ...], float, float]:
        """What the sheared program says, how far that is from the dense model, and the rounding of the program."""
        if (place, draw) not in self._known:
            dense, feed = _in_double(self.model, draw), raised(self._given[place], torch.float64)
            there = AnalysisManager(raise_lora(trace(dense, feed))).get(FindGroups())
            expected = _exactly(self._sheared(dense, there), feed)
            moved = difference(expected, _exactly(dense, feed))
            self._known[place, draw] = expected, moved, rounding(there.program)
        return self._known[place, draw]

    def _sheared(self, dense: nn.Module, groups: Groups) -> nn.Module:
        """The sheared program over the tensors of ``dense``."""
        named = named_tensors(dense)
        owned = {p.name for p in groups.program.params.values() if p.kind != "constant"}
        cut = shear_tensors({name: named[name] for name in owned}, groups, self.plan)
        return graph_module(shear_program(groups, self.plan), cut)

    def require_trace(self) -> None:
        """Raise ``ShearingError`` where the graph of the dense model does not compute what the model itself does."""
        if self.meta:
            return
        with evaluation(self.model), torch.no_grad():
            own = run(self.model, self.feed)
            gap = difference(own, graph_module(self.groups.program, named_tensors(self.model))(**self.feed))
        if gap > _CLEARLY * largest(own):
            raise ShearingError(
                f"the trace of {type(self.model).__name__} is not its function, they differ by {gap:.3g} before "
                "anything is removed: its forward draws random numbers or takes another way under torch.export; pass "
                "inputs that leave it no choice, such as its masks"
            )


class _NoEmptyAttention(TorchFunctionMode):
    """Refuses attention over no heads, which a wrong candidate may ask for.

    Torch 2.11's kernel for CPUs divides by their number, and that ends the process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            for given in (*args, *(kwargs or {}).values()):
                if isinstance(given, Tensor) and not given.numel():
                    raise ShearingError(f"attention over a tensor of shape {list(given.shape)}")
        return func(*args, **(kwargs or {}))


def _failure(model: nn.Module, feed: Inputs) -> str:
    """Why ``model`` does not run on ``feed``; empty where it does."""
    try:
        with evaluation(model), torch.no_grad(), _NoEmptyAttention():
            run(model, feed)
    except Exception as failure:  # a wrong attribute may fail anywhere in the model's own code
        return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    return ""


def rounding(program: Program) -> float:
    """How far outputs in double precision may be apart, as a part of the largest.

    More where a call runs a module that was not looked into, in that module's own precision.
    """
    own = (isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "shear_ir" for n in program.nodes)
    return _SINGLE if any(own) else _ROUNDING


def _exactly(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """What ``model`` says in double precision, also where its forward asks for single."""
    with evaluation(model):
        return Side.of(model).ask(run, feed, torch.float64)


_known: weakref.WeakKeyDictionary[fx.Graph, dict[tuple[str, tuple[int, ...]], Traced]] = weakref.WeakKeyDictionary()

_asked: weakref.WeakKeyDictionary[fx.Graph, dict[tuple[int, ...], tuple[Guard, ...]]] = weakref.WeakKeyDictionary()


def _further(model: nn.Module, groups: Groups, feed: Inputs) -> Traced:
    """The longest inputs that can be traced, and the groups there; kept with the graph, for all plans ask it."""

    def longest() -> Iterator[Inputs]:
        asked = frozenset[int]().union(*(guard.numbers for guard in _guards(model, groups, feed)))
        yield from longer(model, feed, asked=asked)

    return _kept(groups, ("longest", _shape(feed)), lambda: _traced(model, longest(), 1))


def _past_guards(model: nn.Module, groups: Groups, feed: Inputs) -> Traced:
    """Inputs for which forward decides otherwise than for ``feed`` and the longest ones, and the groups there."""

    def beyond_each() -> Iterator[Inputs]:
        tried = [feed, *(longest for longest, _ in _further(model, groups, feed))]
        for guard in _guards(model, groups, feed):
            if all(map(guard.holds, tried)):
                yield from beyond(model, feed, guard, _AFFORDED)[0][:1]

    return _kept(groups, ("guards", _shape(feed)), lambda: _traced(model, beyond_each(), _GUARDS))


def _guards(model: nn.Module, groups: Groups, feed: Inputs) -> tuple[Guard, ...]:
    known = _asked.setdefault(groups.program.graph, {})
    if _shape(feed) not in known:
        known[_shape(feed)] = size_guards(model, feed)
    return known[_shape(feed)]


def _kept(groups: Groups, key: tuple[str, tuple[int, ...]], make: Callable[[], Traced]) -> Traced:
    known = _known.setdefault(groups.program.graph, {})
    if key not in known:
        known[key] = make()
    return known[key]


def _traced(model: nn.Module, feeds: Iterable[Inputs], most: int) -> Traced:
    """The first of ``feeds`` that can be traced, with the groups there."""
    found: list[tuple[Inputs, Groups]] = []
    for feed in feeds:
        try:
            program = raise_lora(trace(model, feed))
        except ShearError:
            continue
        found.append((feed, AnalysisManager(program).get(FindGroups())))
        if len(found) == most:
            break
    return found


def not_possible(groups: Groups, plan: Plan) -> str:
    """Why ``plan`` cannot be applied to a program with these groups; empty where it can."""
    for cut in plan.cuts:
        group = groups.by_name.get(cut.group)
        same = group is not None and (group.kind, group.size) == (cut.kind, cut.size) and cut.kind not in BLOCK_KINDS
        if group is not None and same and not (group.prunable or group.rescalable):
            return f"{group.name} is frozen: {group.reason}"
    try:
        checked(groups, plan)
    except PlanError as failure:
        return str(failure)
    return ""


def _in_double(model: nn.Module, draw: bool) -> nn.Module:
    """A copy of ``model`` in double precision, so that what is rescaled is not rounded; with ``draw``, over weights
    drawn anew, of the size that trained ones have."""
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_floating_point():
            continue
        made = tensor.detach().double()
        if draw and isinstance(tensor, nn.Parameter):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            made = noise * (tensor[0].numel() ** -0.5) if tensor.dim() > 1 and tensor.numel() else made + 0.1 * noise
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copied(model, memo)


def _shape(feed: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(next(iter(tensors_in(feed).values())).shape) if feed else ()


def _told(feed: Mapping[str, Any]) -> str:
    return " x ".join(map(str, _shape(feed)))
