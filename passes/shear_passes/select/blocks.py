"""Selection of blocks: which layers go as a whole, by name or until a share of the parameters is gone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from shear_ir.axes import Indices
from shear_ir.errors import OutOfReach, PlanError, TooLittle
from shear_ir.manager import AnalysisManager
from shear_ir.paths import parent
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BLOCK_KINDS, BlockGroup, Gone, Unit, gone_with
from shear_passes.analysis.cost import CostModel, MeasureCosts
from shear_passes.analysis.find_groups import FindGroups, Group, Groups
from shear_passes.importance import Importance, Scores, criterion
from shear_passes.importance.base import Checked
from shear_passes.rewrite.cuts import Selection, build_plan
from shear_passes.rewrite.drop_blocks import matching
from shear_passes.select.by_ratio import BUDGETS, Budget, whole

BlockOrder = list[tuple[BlockGroup, int]]
"""Units in the order in which they go."""


@dataclass(frozen=True)
class SelectBlocks(Selection):
    """Removes the blocks that ``blocks`` names (globs on module paths), or the least important until ``ratio`` is gone.

    ``ratio`` is a share of the ``budget`` (parameters, bytes, flops, kv_bytes), met as nearly as whole blocks can;
    ``floor``: the share of every list of layers that stays at least. ``kinds``: ``block`` for layers,
    ``attention_block`` and ``mlp_block`` for parts of them. Of every list of layers the same share goes, so that an
    encoder and its decoder both shrink; one block of each stays. ``only`` and ``skip`` are globs on the blocks' paths.
    """

    ratio: float = 0.2
    blocks: tuple[str, ...] = ()
    importance: str | Importance = "order"
    kinds: tuple[str, ...] = ("block",)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    seed: int = 0
    budget: Budget = "parameters"
    floor: float = 0.0

    requires = (FindGroups, MeasureCosts, Importance)

    def run(self, program: Program, analyses: AnalysisManager) -> Plan:
        """Raises ``PlanError`` when the ratio cannot be reached, and for a pattern that matches no block."""
        groups, costs = analyses.get(FindGroups()), analyses.get(MeasureCosts())
        if self.blocks:
            named = {id(unit) for unit in matching(groups, self.blocks)}
            removed = [(g, i) for g in groups.blocks for i, unit in enumerate(g.units) if id(unit) in named]
            return self._plan(groups, costs, removed, "named")
        criterion_ = criterion(self.importance, self.seed) if isinstance(self.importance, str) else self.importance
        order = self._order(groups, Checked(str(criterion_), analyses.get(criterion_)))
        return self._plan(groups, costs, self._enough(program, costs, order), f"least by {criterion_}")

    def _plan(self, groups: Groups, costs: CostModel, removed: BlockOrder, reason: str) -> Plan:
        lost: dict[BlockGroup, list[int]] = {}
        for group, place in removed:
            lost.setdefault(group, []).append(place)
        kept: dict[Group, Indices] = {g: np.setdiff1d(np.arange(g.size), places) for g, places in lost.items()}
        return build_plan(groups, costs, kept, options=self._options(), reason=reason)

    def _options(self) -> dict[str, object]:
        asked = {"blocks": list(self.blocks)} if self.blocks else {
            "ratio": self.ratio, "importance": str(self.importance), "kinds": list(self.kinds),
        }  # fmt: skip
        more = {n: getattr(self, n) for n in ("budget", "floor") if not self.blocks and getattr(self, n) != _PLAIN[n]}
        return {**asked, **{n: list(getattr(self, n)) for n in ("only", "skip", "frozen") if getattr(self, n)}, **more}

    def _order(self, groups: Groups, scores: Scores) -> BlockOrder:
        """Units by the share of their group that has gone before them, and within a group by their score."""
        if not 0.0 <= self.floor < 1.0:
            raise PlanError(f"floor is a share of a group's units from 0 to below 1, not {self.floor}")
        ranked: list[tuple[float, BlockGroup, int]] = []
        for group in self._chosen(groups):
            mine = scores[group]
            free = [i for i, unit in enumerate(group.units) if not unit.reason and self._inside(unit)]
            # Of equals the deeper one goes first; one unit of every group stays.
            least = max(1, whole(self.floor * group.size))
            first = sorted(free, key=lambda i: (mine[i], -i))[: group.size - least]
            ranked += [((rank + 1) / group.size, group, i) for rank, i in enumerate(first)]
        return [(group, i) for _, group, i in sorted(ranked, key=lambda item: item[0])]

    def _chosen(self, groups: Groups) -> list[BlockGroup]:
        for kind in self.kinds:
            if kind not in BLOCK_KINDS:
                raise PlanError(f"{kind} is no kind of block; there are {', '.join(BLOCK_KINDS)}")
        of_kinds = [g for g in groups.blocks if g.kind in self.kinds]
        for pattern in (*self.only, *self.skip):
            if not any(fnmatchcase(path, pattern) for path in groups.program.modules if path):
                raise PlanError(f"the pattern '{pattern}' matches no module")
        if not of_kinds:
            raise PlanError(f"the model has no {' and no '.join(self.kinds)} groups")
        able = [g for g in of_kinds if g.prunable and g.name not in self.frozen]
        if not able:
            reason = next((g.reason for g in of_kinds if g.reason), "every group is frozen")
            raise PlanError(f"{', '.join(self.kinds)} cannot be cut: {reason}")
        return able

    def _inside(self, unit: Unit) -> bool:
        path = unit.path.split(".")
        above = [".".join(path[:length]) for length in range(1, len(path) + 1)]
        owners = {parent(name) for name in unit.parameters} if self.only else set()
        wanted = not self.only or all(
            any(fnmatchcase(name, p) for p in self.only for name in _upwards(owner)) for owner in owners
        )
        return wanted and not any(fnmatchcase(name, p) for p in self.skip for name in above)

    def _enough(self, program: Program, costs: CostModel, order: BlockOrder) -> BlockOrder:
        """The first units of ``order`` that together come nearest to the ratio."""
        if not 0.0 < self.ratio < 1.0:
            raise PlanError(f"ratio is a share of the parameters between 0 and 1, not {self.ratio}")
        if self.budget not in BUDGETS:
            raise PlanError(f"there is no budget '{self.budget}'; there are {', '.join(BUDGETS)}")
        total = getattr(costs.now, self.budget)
        target = self.ratio * total
        gone = [0]
        for count in range(1, len(order) + 1):
            went = gone_with(program, [group.units[i] for group, i in order[:count]])
            gone.append(self._lost(program, costs, went))
            if gone[-1] >= target:
                break
        if gone[-1] < target:
            left = f"{self.floor:g} of the blocks" if self.floor else "one block"
            raise OutOfReach(
                f"a ratio of {self.ratio} cannot be reached: with the kinds {', '.join(self.kinds)} and {left} left in "
                f"every list, at most {math.floor(1000 * gone[-1] / max(1, total)) / 1000} of the "
                f"{BUDGETS[self.budget]} can go"
            )
        count = min(range(len(gone)), key=lambda n: abs(gone[n] - target))
        if not count:
            raise TooLittle(f"a ratio of {self.ratio} removes nothing: the smallest step, one block, is larger")
        return order[:count]

    def _lost(self, program: Program, costs: CostModel, went: Gone) -> int:
        if self.budget == "parameters":
            return sum(p.numel for n in went.parameters if (p := program.params[n]).kind == "parameter")
        return int(getattr(costs.now, self.budget) - getattr(costs.at({}, went), self.budget))


_PLAIN = {"budget": "parameters", "floor": 0.0}


def _upwards(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
