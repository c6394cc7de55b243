"""What must be true of every program, and how much of it was exercised.

- cut in the graph, alone and together, it computes what its masked original does; cut in the modules, too, or refused;
- every call is local (``tests.oracle.locality``);
- other names of its tensors change no decision;
- the sheared program has the same groups without the units that went, what was frozen still is;
- cutting twice is cutting once.

All in double precision, so that what differs is wrong and not rounded.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import shear_ir as sir
from shear_backends.graph.module import graph_module, named_tensors
from shear_backends.verify.masked_blocks import MaskedBlocks, block_cuts
from shear_backends.verify.numbers import masked
from shear_ir.axes import Hold, Indices
from shear_ir.frontend.inputs import Inputs
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_ir.verifier import verify_program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import BlockGroup, FindGroups, Group, Groups
from shear_passes.ops.registry import op_name
from shear_passes.rewrite.cuts import build_plan
from shear_passes.rewrite.shear import cut_tensors, shear_program, shear_tensors
from tests.oracle.fuzz.draft import Sketch
from tests.oracle.fuzz.quick import quick_trace
from tests.oracle.locality import check_calls

TOLERANCE = 1e-9
Run = Callable[[Inputs], tuple[Tensor, ...]]
Rebuild = Callable[[int], nn.Module]
WEIGHTS = range(1, 17)
"""Seeds of other weights, with which a program that has no value by chance shows it."""


class Broken(AssertionError):
    """Something that must be true of every program is not of this one."""


@dataclass
class Seen:
    """What one program exercised. ``moved``: plans that changed the outputs; ``modules``: cut in the modules, refused;
    ``undefined``: plans with which the masked original has no value, nor the original itself with some other weights."""

    ops: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    prunable: int = 0
    frozen: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    moved: int = 0
    undefined: int = 0
    modules: Counter[str] = field(default_factory=Counter)
    untraced: str = ""


@contextmanager
def double() -> Iterator[None]:
    """New tensors are of double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(sketch: Sketch, *, seed: int = 0, thorough: bool = False) -> Seen:
    """Raise ``Broken``, or whatever the code under test raises, unless all is true of the program.

    ``thorough``: traced by torch.export, which must see the same operators, and cut by both backends; without, the
    graph is run node by node, and one program in four is asked about names and locality.
    """
    with double(), torch.no_grad():
        model = sketch.build()
        feeds = [sketch.feed(0), sketch.feed(1)]
        if thorough:
            seen = check_model(model, feeds, seed=seed, rebuild=sketch.build)
            if not seen.untraced:
                _same_operators(seen, quick_trace(model, feeds[0]))
            return seen
        return check_quickly(model, feeds, seed=seed, rebuild=sketch.build)


def check_quickly(model: nn.Module, feeds: Sequence[Inputs], *, seed: int = 0, rebuild: Rebuild | None = None) -> Seen:
    """As ``check`` without ``thorough``, for any module that the quick tracer can trace."""
    case = _Case(model, feeds, quick_trace(model, feeds[0]), random.Random(seed), rebuild=rebuild)
    case.check_plans()
    if seed % 4 == 0:
        case.check_names()
        case.check_locality()
    return case.seen


def check_model(model: nn.Module, feeds: Sequence[Inputs], *, seed: int = 0, rebuild: Rebuild | None = None) -> Seen:
    """All of it, for any module; it is traced with the first of ``feeds``. ``rebuild``: it with other weights."""
    try:
        program = sir.trace(model, feeds[0])
    except sir.TraceError as failure:
        return Seen(untraced=str(failure))
    case = _Case(model, feeds, program, random.Random(seed), thorough=True, rebuild=rebuild)
    case.check_names()
    case.check_locality()
    case.check_plans()
    case.check_modules()
    return case.seen


def _same_operators(seen: Seen, other: Program) -> None:
    quick = Counter(op_name(node) for node in other.calls())
    if quick != seen.ops:
        raise Broken(f"torch.export and its tracer differ: {seen.ops - quick} against {quick - seen.ops}")


class _Case:
    """One module, its program and its groups."""

    def __init__(
        self, model: nn.Module, feeds: Sequence[Inputs], program: Program, rng: random.Random, thorough: bool = False,
        rebuild: Rebuild | None = None,
    ) -> None:  # fmt: skip
        self.model, self.feeds, self.program, self.rng, self.thorough = model, feeds, program, rng, thorough
        self.rebuild = rebuild
        self.groups = sir.groups(program)
        # Whole blocks are modules, of which only torch.export knows.
        wide = [g for g in (self.groups if thorough else self.groups.of_axes) if g.size > 1]
        self.able = [g for g in wide if (g.prunable or g.rescalable) and g.least < g.size]
        reasons = (_reason(g).partition(" at %")[0].partition(":")[0] for g in wide if g not in self.able)
        self.seen = Seen(
            ops=Counter(op_name(node) for node in program.calls()),
            groups=len(wide),
            prunable=len(self.able),
            frozen=Counter(reasons),
        )
        self.dense = [_outputs(model, feed) for feed in feeds]

    def check_locality(self) -> None:
        """Every call on its own."""
        check_calls(self.model, self.groups.axes, self.groups.zeros, self.feeds[0], rounds=1)

    def check_plans(self) -> None:
        """One group alone, all together, and what is left of them once more; ``thorough``: each alone."""
        if not self.able:
            return
        if len(self.able) > 1:
            for group in self.able if self.thorough else [self.rng.choice(self.able)]:
                self.check_plan(self.plan(self.groups, [group], fewest=1))
        left = [g for g in self.groups.of_axes if g in self.able and g.size > 2]
        if self.thorough or not left or self.rng.random() < 0.3:
            self.check_plan(self.plan(self.groups, self.able, fewest=1))
        if left:
            self.check_twice(self.plan(self.groups, left, fewest=2))

    def plan(self, groups: Groups, cut: Sequence[Group], fewest: int) -> Plan:
        """Each group of ``cut`` keeps a random choice of its units, at least ``fewest``.

        Of groups that are chosen from, one alone is cut: together they may leave too little to choose from.
        """
        chosen = [g for g in cut if g.least > 1][1:]
        kept = {g: self.units(g, max(fewest, g.least)) for g in cut if g not in chosen}
        return build_plan(groups, sir.analyses(groups.program).get(MeasureCosts()), kept)

    def units(self, group: Group, fewest: int) -> Indices:
        """A random choice, so many that the kernels that read it allow for; blocks that cannot go stay."""
        if isinstance(group, BlockGroup) and group.fixed:
            loose = sorted(set(range(group.size)) - group.fixed.keys())
            stay = self.rng.sample(loose, self.rng.randrange(len(loose)))
            return np.array(sorted([*group.fixed, *stay]), np.int64)
        counts = [n for n in range(fewest, group.size) if n % group.multiple == 0] or [group.size]
        return np.array(sorted(self.rng.sample(range(group.size), self.rng.choice(counts))), np.int64)

    def check_plan(self, plan: Plan) -> Program:
        """The graph computes what the masked original does."""
        small = shear_program(self.groups, plan)
        self.compare(plan, self.runs(small, shear_tensors(named_tensors(self.model), self.groups, plan)), "the graph")
        return small

    def runs(self, program: Program, tensors: Mapping[str, Tensor]) -> Run:
        """A cut program as a function: by the graph backend, or node by node."""
        if self.thorough:
            verify_program(program)
            module = graph_module(program, tensors)
            return lambda feed: _tensors(module(**feed))
        interpreter = fx.Interpreter(nn.Module(), graph=program.graph)

        def run(feed: Inputs) -> tuple[Tensor, ...]:
            named = {**tensors, **program.constants, **feed}
            names = (program.of_placeholder.get(n.name, n.name) for n in program.nodes if n.op == "placeholder")
            return _tensors(interpreter.run(*(named[name] for name in names), enable_io_processing=False))

        return run

    def compare(self, plan: Plan, run: Run, what: str) -> None:
        reference = masked(self.model, plan.kept, plan.routers, plan.gains)
        without = MaskedBlocks(reference, plan.cuts) if block_cuts(plan.cuts) else None
        self.seen.plans += 1
        moved = 0.0
        tried = len(self.feeds) if self.thorough or self.seen.plans == 1 else 1
        for feed, dense in zip(self.feeds[:tried], self.dense[:tried], strict=True):
            expected = _tensors(without(feed)) if without else _outputs(reference, feed)
            found = run(feed)
            gap = _gap(expected, found)
            if not gap <= TOLERANCE:
                if self.undefined(expected, feed):
                    self.seen.undefined += 1
                    return
                raise Broken(f"{what} differs from the masked original by {gap:.3g} with {_cuts(plan)}")
            moved = max(moved, _gap(expected, dense))
        self.seen.moved += moved > 1e-6

    def undefined(self, expected: Sequence[Tensor], feed: Inputs) -> bool:
        """Whether there is no value, and the program as it is has none either with some weights, such as 0 / 0."""
        if self.rebuild is None or all(bool(t.isfinite().all()) for t in expected):
            return False
        drawn = (_outputs(self.rebuild(seed), feed) for seed in WEIGHTS)
        return any(not t.isfinite().all() for outputs in drawn for t in outputs)

    def check_twice(self, first: Plan) -> None:
        """The sheared program has the groups that are left, and a second cut composes with the first."""
        once = self.check_plan(first)
        left = sir.groups(once)
        _same_groups(self.groups, left, first)
        able = [g for g in left.of_axes if (g.prunable or g.rescalable) and max(g.least, 1) < g.size]
        names = {c.group: len(c.kept) for c in first.cuts}
        able = [g for g in able if g.size == names.get(g.name, self.groups.by_name[g.name].size)]
        if not able:
            return
        second = self.plan(left, able, fewest=1)
        joined = first.then(second)
        tensors = cut_tensors(cut_tensors(named_tensors(self.model), first.kept), second.kept)
        self.check_plan(joined)
        self.compare(joined, self.runs(shear_program(left, second), tensors), "the graph cut twice")

    def check_modules(self) -> None:
        """The module backend's result, where it gives one, and the graph whose batch and length stayed symbolic."""
        able = [g for g in self.groups.of_axes if g in self.able]
        if not able:
            return
        for plan in (self.plan(self.groups, [self.rng.choice(able)], 1), self.plan(self.groups, able, 1)):
            try:
                small = sir.shear(self.model, plan, inputs=self.feeds[0])
            except sir.ShearingError:
                self.seen.modules["refused"] += 1
                continue
            self.seen.modules["cut"] += 1
            free = sir.shear(self.model, plan, backend="graph", inputs=self.feeds[0])
            self.compare(plan, partial(_outputs, free), "the graph of free sizes")
            self.compare(plan, partial(_outputs, small), "the module")

    def check_names(self) -> None:
        """Names that sort the other way round: the same groups, frozen or not as before."""
        ordered = sorted(self.program.params)
        names = {name: f"z{len(ordered) - place}.{name[::-1]}" for place, name in enumerate(ordered)}
        other = AnalysisManager(_renamed(self.program, names)).get(FindGroups())
        mine, theirs = _decisions(self.groups, names), _decisions(other, None)
        if mine != theirs:
            raise Broken(f"names decide: {mine - theirs} against {theirs - mine}")


def _renamed(program: Program, names: Mapping[str, str]) -> Program:
    return replace(
        program,
        params={names[n]: replace(p, name=names[n], aliases=()) for n, p in program.params.items()},
        of_placeholder={placeholder: names[n] for placeholder, n in program.of_placeholder.items()},
        constants={names[n]: tensor for n, tensor in program.constants.items()},
    )


def _decisions(groups: Groups, names: Mapping[str, str] | None) -> Counter[Any]:
    return Counter(
        (
            frozenset((names[s.parameter] if names else s.parameter, s.dim) for s in g.slices),
            g.size,
            g.kind,
            _held(g),
            _reason(g),
        )
        for g in groups.of_axes
    )


def _same_groups(before: Groups, after: Groups, plan: Plan) -> None:
    """Every group that can go still can, with the units left; what was held is held, where it is still an axis."""
    left = {c.group: len(c.kept) for c in plan.cuts}
    old = Counter((_places(g, before.program), left.get(g.name, g.size), _held(g)) for g in before.of_axes)
    new = Counter((_places(g, after.program), g.size, _held(g)) for g in after.of_axes)
    if old != new:
        raise Broken(
            f"cut by {_cuts(plan)}, groups {sorted(map(str, (old - new)))} became {sorted(map(str, (new - old)))}"
        )


def _places(group: Group, program: Program) -> frozenset[tuple[str, int]]:
    """Where a group occurs, leaving out the constants that the rewrite itself adds."""
    return frozenset((s.parameter, s.dim) for s in group.slices if not s.parameter.startswith("kept_"))


def _held(group: Group) -> Hold | None:
    return group.freeze.hold if group.freeze else None


def _reason(group: Group) -> str:
    """Why a group is frozen, without the numbers of atoms."""
    return re.sub(r"\ba\d+:", "", group.reason)


def _cuts(plan: Plan) -> str:
    return "; ".join(f"{c.group} keeping {c.kept.tolist()} of {c.size}" for c in plan.cuts)


def _outputs(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    return _tensors(model(**{name: value.clone() for name, value in feed.items()}))


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _gap(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference over the largest entry; infinite where shapes differ or only one side is no finite number."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        both = (a == b) | ~(a.isfinite() | b.isfinite())
        gap = torch.where(both, 0.0, (a - b).abs()) / max(1.0, float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        worst = max(worst, float(gap.nan_to_num(float("inf")).max()))
    return worst


__all__ = ["Broken", "Seen", "check", "check_model", "check_quickly", "double"]
