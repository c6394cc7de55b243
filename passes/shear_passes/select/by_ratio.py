"""Selection by ratio: how many units stay of each group, solved on the real cost of the model."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from shear_ir.axes import Indices
from shear_ir.errors import OutOfReach, PlanError, TooLittle
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.cost import CostModel, MeasureCosts
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance import Importance, Scores, criterion
from shear_passes.importance.base import Checked, Score
from shear_passes.rewrite.cuts import Selection, build_plan
from shear_passes.select.choose import DEFAULT_KINDS, HEAD_KINDS, choose

Budget = Literal["parameters", "bytes", "flops", "kv_bytes"]
BUDGETS: dict[Budget, str] = {
    "parameters": "parameters", "bytes": "bytes", "flops": "FLOPs", "kv_bytes": "KV bytes per token",
}  # fmt: skip

Shares = Callable[[float], Mapping[Group, float]]
"""From a share, 0 for nothing and 1 for as much as can go, to how many units should stay of each group, unrounded."""

_NEAR = 0.005
"""How far from the ratio what goes may be before some groups keep a step more or less than their share."""

_FEW = 32
"""Classes of groups for which single steps are tried."""

# A group of these is a few large units, which no kernel wants in multiples.
_COUNTED = (*HEAD_KINDS, "expert", "block")

_UNNOTICED = 0.001


@dataclass(frozen=True)
class SelectByRatio(Selection):
    """Removes the least important units until ``ratio`` of the model is gone; a subclass shares that out over groups.

    ``budget``: what ``ratio`` is a share of: parameters, bytes, flops, or kv_bytes of a generated token. What stays of
    a group is a multiple of ``round_to``, heads, experts and blocks excepted; words such as ``ffn=64`` set it for a
    kind. Where kernels want a multiple of some number, it is one of that, too. ``floor``: the share of its units that
    stays in every group at least. ``units``: what is not solved for: words such as ``kv_head=4/6``, which say that
    groups of six key-value heads keep four. ``only`` and ``skip`` are globs on module paths, ``frozen`` names groups
    that stay whole. Kinds that a normalisation holds are cut only when named.
    """

    ratio: float = 0.2
    importance: str | Importance = "magnitude"
    round_to: int | tuple[str, ...] = 1
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    kinds: tuple[str, ...] = DEFAULT_KINDS
    seed: int = 0
    units: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    budget: Budget = "parameters"
    floor: float = 0.0

    requires = (FindGroups, MeasureCosts, Importance)

    @abstractmethod
    def wanted(self, groups: Sequence[Group], scores: Scores, program: Program) -> Shares:
        """How ``groups`` share what goes."""

    def run(self, program: Program, analyses: AnalysisManager) -> Plan:
        """Raises ``PlanError`` when the ratio cannot be reached, saying what can."""
        solver = self._solver(analyses)
        counts = solver.solve()
        criterion_ = self._criterion()
        kept = {g: best(solver.scores[g], count) for g, count in counts.items()}
        costs, groups = analyses.get(MeasureCosts()), analyses.get(FindGroups())
        plan = build_plan(groups, costs, kept, options=self._options(criterion_), reason=f"least by {criterion_}")
        return replace(plan, notes=(*plan.notes, *solver.missed(counts)))

    def counts(self, analyses: AnalysisManager) -> dict[Group, int]:
        """How many units stay of each chosen group; raises as ``run`` does."""
        return self._solver(analyses).solve()

    def alike(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups that keep equal numbers of units; each by itself here."""
        return [[group] for group in groups]

    def _solver(self, analyses: AnalysisManager) -> _Solver:
        self._check()
        chosen = choose(analyses.get(FindGroups()), self.only, self.skip, self.kinds, self.frozen)
        criterion_ = self._criterion()
        scores = Checked(str(criterion_), analyses.get(criterion_))
        return _Solver(self, chosen, scores, analyses.get(MeasureCosts()))

    def step(self, kind: str) -> int:
        """What stays of a group of this kind is a multiple of it."""
        given = self._steps
        return given.get(kind, 1 if kind in _COUNTED else given.get("", 1))

    @cached_property
    def _steps(self) -> dict[str, int]:
        """By kind; for all others under the empty word."""
        if isinstance(self.round_to, int):
            return {"": self.round_to}
        found = {}
        for word in self.round_to:
            kind, _, number = word.rpartition("=")
            if kind and kind not in self.kinds:
                raise PlanError(f"round_to speaks of {kind}, but what is cut are the kinds {', '.join(self.kinds)}")
            if not number.isdecimal():
                raise PlanError(f"round_to takes a number, or words such as ffn=64, not '{word}'")
            found[kind] = int(number)
        return found

    @cached_property
    def fixed(self) -> dict[tuple[str, int], int]:
        """How many units stay, by the kind and size of a group, as ``units`` says it."""
        found = {}
        for word in self.units:
            kind, _, share = word.partition("=")
            count, _, size = share.partition("/")
            if not count.isdecimal() or not size.isdecimal() or not 0 < int(count) <= int(size):
                raise PlanError(f"units takes words such as kv_head=4/6, not '{word}'")
            found[kind, int(size)] = int(count)
        return found

    def _check(self) -> None:
        if self.budget not in BUDGETS:
            raise PlanError(f"there is no budget '{self.budget}'; there are {', '.join(BUDGETS)}")
        if not 0.0 < self.ratio < 1.0:
            raise PlanError(f"ratio is a share of the {BUDGETS[self.budget]} between 0 and 1, not {self.ratio}")
        if any(step < 1 for step in self._steps.values()):
            raise PlanError(f"round_to is a number of units from 1 up, not {self.round_to}")
        if not 0.0 <= self.floor < 1.0:
            raise PlanError(f"floor is a share of a group's units from 0 to below 1, not {self.floor}")

    def _options(self, used: Importance) -> dict[str, object]:
        return {
            "allocation": self.name().removeprefix("select-"), "ratio": self.ratio, "importance": str(used),
            "round_to": self.round_to if isinstance(self.round_to, int) else list(self.round_to),
            "only": list(self.only), "skip": list(self.skip), "kinds": list(self.kinds),
            **({"units": list(self.units)} if self.units else {}),
            **({"frozen": list(self.frozen)} if self.frozen else {}),
            **({"budget": self.budget} if self.budget != "parameters" else {}),
            **({"floor": self.floor} if self.floor else {}),
        }  # fmt: skip

    def _criterion(self) -> Importance:
        return criterion(self.importance, self.seed) if isinstance(self.importance, str) else self.importance


@dataclass
class _Solver:
    """Bisection over the share that goes; counts are of units that stay."""

    asked: SelectByRatio
    chosen: list[Group]
    scores: Scores
    costs: CostModel

    def __post_init__(self) -> None:
        axes = {g.axis for g in self.chosen}
        self._parameters = self.costs.parameters_in(axes) if self.asked.budget == "parameters" else None
        self.total = self._cost({g: g.size for g in self.chosen})
        self.groups = [g for g in self.chosen if self._counts_for(g)]
        # One for a kind, so that channels of experts and of what is beside them stay alike.
        kinds: set[str] = {g.kind for g in self.groups}
        multiples = {kind: [g.multiple for g in self.groups if g.kind == kind] for kind in kinds}
        self._steps = {kind: math.lcm(self.asked.step(kind), *multiples[kind]) for kind in kinds}
        if not self.groups:
            words = BUDGETS[self.asked.budget]
            raise PlanError(f"no group of the kinds {', '.join(self.asked.kinds)} changes the {words} of this model")
        self.wanted = self.asked.wanted(self.groups, self.scores, self.costs.program)

    def solve(self) -> dict[Group, int]:
        target = self.asked.ratio * self.total
        most = self.total - self._cost(self._counts(1.0))
        if most < target:
            raise OutOfReach(self._too_much(most))
        fixed = self._counts(self._bisect(self._counts, target))
        finest = self._finest()
        result = fixed
        # Coarse units (heads) are rounded at the common share; the finest kind then makes up the difference.
        if finest is not None:
            fine = self._bisect(lambda share: self._mixed(fixed, share, finest), target)
            result = self._mixed(fixed, fine, finest)
        movable = [g for g in self.groups if finest in (None, g.kind)]
        common = result
        result = self._nearer(result, common, self.asked.alike(movable), target)
        # No config tells the channels of single convolutions: where equal ones are too coarse, they part.
        result = self._nearer(result, common, [[g] for g in movable if g.kind == "conv_channel"], target)
        if all(result[g] == g.size for g in self.groups):
            raise TooLittle(
                f"a ratio of {self.asked.ratio} removes nothing: the smallest step, one unit in every layer "
                f"(round_to {self.asked.round_to}), is larger"
            )
        return result

    def missed(self, counts: Mapping[Group, int]) -> Iterator[str]:
        """A sentence about what goes, where that is not what was asked for by more than a unit."""
        gone = (self.total - self._cost(counts)) / self.total
        if not self.asked.units and self._notable(counts, self.asked.ratio * self.total):
            (kind, size), cost = max(self._step_costs(counts).items(), key=lambda item: item[1])
            many = len(self._alike[kind, size])
            yield (
                f"{gone:.3g} of the {BUDGETS[self.asked.budget]} go, not {self.asked.ratio:.3g}, for units are coarse: "
                f"{self._steps[kind]} of {size} {kind} units in {many} group{'s' * (many > 1)} is "
                f"{cost / self.total:.2g} of them"
            )

    def _notable(self, counts: Mapping[Group, int], target: float) -> bool:
        """Whether what goes misses the target by more than one step of one group or a tenth, and enough to be seen."""
        miss = abs(self.total - self._cost(counts) - target)
        if miss <= _UNNOTICED * self.total:
            return False
        return miss > target / 10 or miss > min(
            cost / len(self._alike[over]) for over, cost in self._step_costs(counts).items()
        )

    def _step_costs(self, counts: Mapping[Group, int]) -> dict[tuple[str, int], int]:
        """What a step costs in all groups of a kind and size."""
        up = {over: all(counts[g] < g.size for g in alike) for over, alike in self._alike.items()}
        found = {over: abs(self._moved(counts, over, 1 if up[over] else -1)) for over in self._alike}
        return {over: cost for over, cost in found.items() if cost} or {next(iter(found)): self.total}

    @cached_property
    def _alike(self) -> dict[tuple[str, int], list[Group]]:
        """Groups by kind and size, which one config says together."""
        found: dict[tuple[str, int], list[Group]] = {}
        for group in self.groups:
            found.setdefault((group.kind, group.size), []).append(group)
        return found

    def _shifted(self, counts: Mapping[Group, int], over: tuple[str, int], by: int) -> dict[Group, int]:
        step = by * self._steps[over[0]]
        return {g: n + step if (g.kind, g.size) == over else n for g, n in counts.items()}

    def _moved(self, counts: Mapping[Group, int], over: tuple[str, int], by: int) -> int:
        """What the cost grows by when the groups of this kind and size keep a step more, or less."""
        return self._cost(self._shifted(counts, over, by)) - self._cost(counts)

    def _gone(self, counts: Mapping[Group, int]) -> int:
        return self.total - self._cost(counts)

    def _nearer(
        self, start: dict[Group, int], common: Mapping[Group, int], classes: list[list[Group]], target: float
    ) -> dict[Group, int]:
        """``start`` with some classes one step off the ``common`` share, as few as come near enough to the target."""
        enough = _NEAR * self.total
        result, miss = start, abs(self._gone(start) - target)
        for _ in range(len(classes) if len(classes) <= _FEW else 0):
            if miss <= enough:
                break
            moves = list(self._moves(result, classes))
            if len(classes) <= _FEW // 4:
                moves += [both for one in moves for both in self._moves(one, classes)]
            near = [m for m in moves if all(abs(m[g] - common[g]) <= self._steps[g.kind] for g in m)]
            misses = [abs(self._gone(m) - target) for m in near]
            # The first of the fewest moves, where several are near enough.
            at = min(range(len(near)), key=lambda i: max(misses[i], enough), default=None)
            if at is None or misses[at] >= miss:
                break
            result, miss = near[at], misses[at]
        return result

    def _moves(self, counts: Mapping[Group, int], classes: Sequence[Sequence[Group]]) -> Iterator[dict[Group, int]]:
        """``counts`` with one step more or less of all groups of one class."""
        for alike, sign in itertools.product(classes, (-1, 1)):
            moved = {g: counts[g] + sign * self._steps[g.kind] for g in alike}
            if all(self._round(g, n) == n for g, n in moved.items()):
                yield {**counts, **moved}

    def _too_much(self, most: float) -> str:
        steps = max(self._steps.values())
        experts = max((g.least for g in self.groups if g.kind == "expert"), default=0)
        units = f"{experts} experts" if experts else f"one head and {steps} channels"
        floor = f" and {self.asked.floor:g} of every group" if self.asked.floor else ""
        return (
            f"a ratio of {self.asked.ratio} cannot be reached: with the kinds {', '.join(self.asked.kinds)} and at "
            f"least {units} left in every layer{floor}, at most "
            f"{math.floor(1000 * most / self.total) / 1000} of the {BUDGETS[self.asked.budget]} can go"
        )

    def _bisect(self, counts: Callable[[float], dict[Group, int]], target: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.total - self._cost(counts(middle)) < target:
                low = middle
            else:
                high = middle

        def miss(share: float) -> float:
            return abs(self.total - self._cost(counts(share)) - target)

        return low if miss(low) < miss(high) else high

    def _finest(self) -> str | None:
        kinds = {g.kind: g.parameters_per_unit for g in self.groups}
        return min(kinds, key=kinds.__getitem__) if len(kinds) > 1 else None

    def _mixed(self, fixed: Mapping[Group, int], share: float, kind: str) -> dict[Group, int]:
        fine = self._counts(share)
        return {g: fine[g] if g.kind == kind else fixed[g] for g in self.groups}

    def _counts(self, share: float) -> dict[Group, int]:
        wanted = self.wanted(share)
        return {g: self._round(g, wanted[g]) for g in self.groups}

    def _round(self, group: Group, wanted: float) -> int:
        step = self._steps[group.kind]
        least = max(step, step * math.ceil(max(group.least, whole(self.asked.floor * group.size)) / step))
        fixed = self.asked.fixed.get((group.kind, group.size))
        if fixed is not None:
            if fixed < group.size and (fixed < least or fixed % step):
                raise PlanError(f"{fixed} {group.kind} units are fewer than the floor, or no multiple of round_to")
            return fixed
        return min(group.size, max(least, step * round(wanted / step)))

    def _counts_for(self, group: Group) -> bool:
        """Whether the budget sees a loss of its units."""
        if self.asked.budget in ("parameters", "bytes"):
            return True
        return self._cost({group: 1}) < self.total

    def _cost(self, counts: Mapping[Group, int]) -> int:
        sizes = {g.axis: n for g, n in counts.items()}
        if self._parameters is not None:
            return self._parameters({g.axis: g.size for g in self.chosen} | sizes)
        return int(getattr(self.costs.at(sizes), self.asked.budget))


def whole(units: float) -> int:
    """The least number of units that is no less, but for the rounding of a product."""
    return math.ceil(round(units, 9))


def best(scores: Score, count: int) -> Indices:
    """The ``count`` units of the highest scores, in order; ties go to the lower index."""
    if count == len(scores):
        return np.arange(count)
    edge = np.partition(scores, -count)[-count]
    stays = scores > edge
    stays[np.flatnonzero(scores == edge)[: count - np.count_nonzero(stays)]] = True
    return np.flatnonzero(stays)
