"""Uniform selection: one sparsity per kind, solved on the real parameter count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

import numpy as np

from shear_ir.axes import Indices
from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.cost import CostModel, MeasureCosts
from shear_passes.analysis.find_groups import FindGroups, Group, Groups
from shear_passes.importance import Importance, Scores, criterion
from shear_passes.importance.base import Score
from shear_passes.select.build import Selection, build_plan

DEFAULT_KINDS = ("ffn", "kv_head")
HEAD_KINDS = ("kv_head", "query_group")


@dataclass(frozen=True)
class SelectUniform(Selection):
    """Removes the least important units until ``ratio`` of the model's parameters is gone.

    Every group of a kind loses the same share, so that equal layers stay equal (``uniform=False``: units of one kind
    compete across layers). What stays of a group is a multiple of ``round_to``, heads excepted. ``heads``: how many
    heads stay in every layer, 0 to solve for it. ``only`` and ``skip`` are globs on module paths, ``frozen`` names
    groups that stay whole. Kinds that a normalisation holds are cut only when named.
    """

    ratio: float = 0.2
    importance: str | Importance = "magnitude"
    round_to: int = 1
    uniform: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    kinds: tuple[str, ...] = DEFAULT_KINDS
    seed: int = 0
    heads: int = 0
    frozen: tuple[str, ...] = ()

    requires = (FindGroups, MeasureCosts, Importance)

    def run(self, program: Program, analyses: AnalysisManager) -> Plan:
        """Raises ``PlanError`` when the ratio cannot be reached, saying what can."""
        counts = self.counts(analyses)
        groups = analyses.get(FindGroups())
        criterion_ = self._criterion()
        scores = analyses.get(criterion_)
        kept = {g: _best(scores[g], count) for g, count in counts.items()}
        options = {
            "ratio": self.ratio, "importance": str(criterion_), "round_to": self.round_to, "uniform": self.uniform,
            "only": list(self.only), "skip": list(self.skip), "kinds": list(self.kinds),
            **({"heads": self.heads} if self.heads else {}),
            **({"frozen": list(self.frozen)} if self.frozen else {}),
        }  # fmt: skip
        return build_plan(groups, analyses.get(MeasureCosts()), kept, options=options, reason=f"least by {criterion_}")

    def counts(self, analyses: AnalysisManager) -> dict[Group, int]:
        """How many units stay of each chosen group; raises as ``run`` does."""
        if not 0.0 < self.ratio < 1.0:
            raise PlanError(f"ratio is a share of the parameters between 0 and 1, not {self.ratio}")
        if self.round_to < 1:
            raise PlanError(f"round_to is a number of units from 1 up, not {self.round_to}")
        chosen = choose(analyses.get(FindGroups()), self.only, self.skip, self.kinds, self.frozen)
        return _Solver(self, chosen, analyses.get(self._criterion()), analyses.get(MeasureCosts())).solve()

    def _criterion(self) -> Importance:
        return criterion(self.importance, self.seed) if isinstance(self.importance, str) else self.importance


def choose(
    groups: Groups, only: Sequence[str], skip: Sequence[str], kinds: Sequence[str], frozen: Sequence[str] = ()
) -> list[Group]:
    """The groups of these kinds inside ``only`` and outside ``skip``, but not those that are named in ``frozen``.

    Raises ``PlanError`` when there are none, and for a pattern or a name of nothing.
    """
    for name in frozen:
        if name not in groups.by_name:
            raise PlanError(f"there is no group {name} to leave whole; groups are named like {next(iter(groups)).name}")
    paths = [path for path in groups.program.modules if path]
    for pattern in (*only, *skip):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise PlanError(f"the pattern '{pattern}' matches no module; modules are named like {paths[-1]}")
    chosen = []
    known = {g.kind for g in groups}
    for kind in kinds:
        of_kind = [g for g in groups if g.kind == kind]
        if not of_kind and tuple(kinds) != DEFAULT_KINDS:
            raise PlanError(f"the model has no {kind} groups; it has {', '.join(sorted(known))}")
        lifted = tuple(kinds) != DEFAULT_KINDS
        able = [g for g in of_kind if g.prunable or (lifted and g.rescalable)]
        if of_kind and not able and lifted:
            raise PlanError(f"{kind} cannot be cut: {of_kind[0].reason}")
        chosen += [g for g in able if g.size > 1 and g.name not in frozen and _inside(groups, g, only, skip)]
    if not chosen and frozen:
        choose(groups, only, skip, kinds)
        raise PlanError("the largest ratio that can be reached is 0, since every group that could lose units is frozen")
    if not chosen:
        reasons = sorted({g.reason for g in groups if g.kind in kinds and g.reason})
        raise PlanError(
            f"nothing can be removed: no prunable group of the kinds {', '.join(kinds)}"
            + (" under the given patterns" if only or skip else "")
            + (f" ({reasons[0]})" if reasons else f"; the model has {', '.join(sorted(known))}")
        )
    return chosen


def _inside(groups: Groups, group: Group, only: Sequence[str], skip: Sequence[str]) -> bool:
    owners = {s.parameter.rpartition(".")[0] for s in group.slices}
    above = {owner: list(accumulate(owner.split("."), lambda a, b: f"{a}.{b}")) for owner in owners}

    def hit(owner: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, pattern) for path in above[owner] for pattern in patterns)

    return (not only or all(hit(o, only) for o in owners)) and not any(hit(o, skip) for o in owners)


@dataclass
class _Solver:
    """Bisection over the sparsity; counts are of units that stay."""

    asked: SelectUniform
    groups: list[Group]
    scores: Scores
    costs: CostModel

    def __post_init__(self) -> None:
        self._count = self.costs.parameters_in({g.axis for g in self.groups})

    def solve(self) -> dict[Group, int]:
        total = self.costs.program.parameter_count
        target = self.asked.ratio * total
        most = total - self._parameters(self._counts(1.0))
        if most < target:
            raise PlanError(
                f"a ratio of {self.asked.ratio} cannot be reached: with the kinds {', '.join(self.asked.kinds)} and at "
                f"least one head and {self.asked.round_to} channels left in every layer, at most "
                f"{math.floor(1000 * most / total) / 1000} of the parameters can go"
            )
        share = self._bisect(self._counts, target, total)
        fixed = self._counts(share)
        finest = self._finest()
        best = fixed
        # Coarse units (heads) are rounded at the common sparsity; the finest kind then makes up the difference.
        if finest is not None:
            fine = self._bisect(lambda s: self._mixed(fixed, s, finest), target, total)
            best = self._mixed(fixed, fine, finest)
        if all(best[g] == g.size for g in self.groups):
            raise PlanError(
                f"a ratio of {self.asked.ratio} removes nothing: the smallest step, one unit in every layer "
                f"(round_to {self.asked.round_to}), is larger"
            )
        return best

    def _bisect(self, counts: Callable[[float], dict[Group, int]], target: float, total: int) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if total - self._parameters(counts(middle)) < target:
                low = middle
            else:
                high = middle

        def miss(share: float) -> float:
            return abs(total - self._parameters(counts(share)) - target)

        return low if miss(low) < miss(high) else high

    def _finest(self) -> str | None:
        kinds = {g.kind: g.parameters_per_unit for g in self.groups}
        return min(kinds, key=kinds.__getitem__) if len(kinds) > 1 else None

    def _mixed(self, fixed: Mapping[Group, int], share: float, kind: str) -> dict[Group, int]:
        fine = self._counts(share)
        return {g: fine[g] if g.kind == kind else fixed[g] for g in self.groups}

    def _counts(self, share: float) -> dict[Group, int]:
        if self.asked.uniform:
            return {g: self._round(g, (1.0 - share) * g.size) for g in self.groups}
        wanted: dict[Group, int] = {}
        for kind in {g.kind for g in self.groups}:
            wanted.update(self._ranked([g for g in self.groups if g.kind == kind], share))
        return {g: wanted[g] for g in self.groups}

    def _ranked(self, groups: list[Group], share: float) -> dict[Group, int]:
        """Units of one kind compete by their score over the root mean square of their group's scores."""
        scaled = [self.scores[g] / (np.sqrt(np.mean(self.scores[g] ** 2)) or 1.0) for g in groups]
        ranked = np.sort(np.concatenate(scaled))
        gone = round(share * len(ranked))
        limit = ranked[gone] if gone < len(ranked) else np.inf
        return {g: self._round(g, float((s >= limit).sum())) for g, s in zip(groups, scaled, strict=True)}

    def _round(self, group: Group, wanted: float) -> int:
        if group.kind in HEAD_KINDS and self.asked.heads:
            return min(group.size, self.asked.heads)
        step = 1 if group.kind in HEAD_KINDS else self.asked.round_to
        return min(group.size, max(step, step * round(wanted / step)))

    def _parameters(self, counts: Mapping[Group, int]) -> int:
        return self._count({g.axis: n for g, n in counts.items()})


def _best(scores: Score, count: int) -> Indices:
    """The ``count`` units of the highest scores, in order; ties go to the lower index."""
    if count == len(scores):
        return np.arange(count)
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    edge = np.partition(ranked, -count)[-count]
    stays = ranked > edge
    stays[np.flatnonzero(ranked == edge)[: count - np.count_nonzero(stays)]] = True
    return np.flatnonzero(stays)
