"""Whether a config of the model's class has the sizes that a plan would leave, and which sizes beside them have one.

Asked for all kinds of groups, before anything is cut: only counts of units matter, and models are built on the meta
device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from shear_backends.module.config_fields import Changes
from shear_backends.module.config_inference import infer_config, new_sizes
from shear_ir.axes import Axis, Indices, Mask, evaluate
from shear_ir.errors import PlanError, ShearingError
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.rewrite.rescale_norm import norm_fixes

UnitCounts = Mapping[Group, int]
"""How many units stay of each group that loses some."""
Class = tuple[str, int]
"""Groups that can only be said together: those of one kind and size."""
Fixed = Mapping[Class, int]
"""How many units stay of the groups of each class that is not left to a ratio."""

_SEARCHES = 4
_TRIES = 40
_ROUNDS = 12


@dataclass(frozen=True)
class Answer:
    """Sizes that a config has: what had to be ``fixed`` for it, and the counts that this gives."""

    fixed: Fixed
    counts: UnitCounts


@dataclass
class Stock:
    """Asks the class of ``model`` for sizes of its ``groups``; what it has once answered makes later answers quick."""

    model: nn.Module
    groups: Groups
    like: Changes = field(default_factory=dict)
    refused: set[frozenset[tuple[Axis, int]]] = field(default_factory=set)
    known: dict[tuple[frozenset[tuple[Axis, int]], bool], str] = field(default_factory=dict)

    def why_not(self, counts: UnitCounts, *, quick: bool = False) -> str:
        """What stands in the way of a config with these counts; empty where the class has one.

        ``quick``: without a search, where one has told other sizes, and without the eps of norms.
        """
        key = _key(counts), quick
        if key not in self.known:
            self.known[key] = self._ask(counts, quick)
        return self.known[key]

    @property
    def last(self) -> str:
        """What stood in the way of the latest counts that were asked for in full; empty where nothing did."""
        return next((why for (_, quick), why in reversed(self.known.items()) if not quick), "")

    def has_fields(self, counts: UnitCounts) -> bool:
        """Whether fields of the config tell these counts, though the class may refuse their values."""
        return not self.why_not(counts) or _key(counts) in self.refused

    def near(self, counts: UnitCounts, over: Class) -> Iterator[int]:
        """The numbers of units next to that of ``over`` with which the class has a config, all others alike."""
        mine = [g for g in counts if (g.kind, g.size) == over]
        now, size, least = counts[mine[0]], over[1], max(g.least for g in mine)
        quick = self.has_fields(counts)
        for side in (range(now - 1, least - 1, -1), range(now + 1, size + quick)):
            for count in self._tries(counts, side, size)[: _TRIES if quick else _SEARCHES]:
                if not self.why_not({**counts, **dict.fromkeys(mine, count)}, quick=quick):
                    yield count
                    break

    def _tries(self, counts: UnitCounts, side: range, size: int) -> list[int]:
        """Some numbers of ``side``, the nearest first: the next ones, the next multiples of other sizes, and all.

        Where no fields are known to tell them, those that most sizes divide are first.
        """
        if not side:
            return []
        sizes = new_sizes(self.groups, _masks(self.groups, counts))
        steps = {n for news in (sizes, *sizes.values()) for n in news if 1 < n <= size}
        edge, up = side[0], side.step > 0
        tries = {n for n in (-(-edge // s) * s if up else edge // s * s for s in steps) if n in side}
        tries |= {*side[:8], *([size] if size in side else [])}
        if self.has_fields(counts):
            return sorted(tries, key=lambda n: abs(n - edge))
        divided = {n: sum(n % s == 0 for s in steps) for n in tries}
        return sorted(tries, key=lambda n: (-divided[n], abs(n - edge)))

    def _ask(self, counts: UnitCounts, quick: bool) -> str:
        masks = _masks(self.groups, counts)
        try:
            fixes = () if quick else tuple(norm_fixes(self.groups, masks))
        except ShearingError as failure:
            return str(failure)
        left = {g.axis: n for g, n in counts.items()}
        kept: dict[str, dict[int, Indices]] = {}
        for name, dims in self.groups.axes.of_param.items():
            for place, dim in enumerate(dims):
                new = evaluate(dim, lambda a: left.get(a, a.size))
                if new != dim.size:
                    kept.setdefault(name, {})[place] = np.arange(new)
        found = infer_config(self.model, self.groups, masks, kept, fixes, self.like, searching=not quick)
        if found.changes:
            self.like = dict(found.changes)
            self.refused.add(_key(counts))
        if found.config is not None:
            return ""
        return found.refused or f"no config of {self._class} has these sizes"

    @property
    def _class(self) -> str:
        return type(self.model).__name__


def nearest(stock: Stock, solve: Callable[[Fixed], UnitCounts]) -> list[Answer]:
    """Sizes that a config has, found by fixing one kind after the other at numbers that the class accepts.

    ``solve``: the counts that a ratio gives with what is fixed; raises ``PlanError`` where it cannot be reached.
    """
    answers: list[Answer] = []
    waiting: list[Fixed] = [{}]
    for _ in range(_ROUNDS):
        if not waiting:
            break
        fixed = waiting.pop(0)
        try:
            counts = solve(fixed)
        except PlanError:
            continue
        if not stock.why_not(counts):
            answers.append(Answer(fixed, counts))
            continue
        blamed = [over for over in classes(counts) if over not in fixed]
        if not stock.has_fields(counts):
            # Kinds without which the rest has a config: it is they that no field can tell, or not in these numbers.
            whole: dict[str, dict[Class, int]] = {
                kind: {(g.kind, g.size): g.size for g in counts if g.kind == kind} for kind, _ in blamed
            }
            left = {kind: {g: n for g, n in counts.items() if g.kind != kind} for kind in whole}
            alone = [kind for kind, rest in left.items() if rest and not stock.why_not(rest)]
            waiting += [{**fixed, **whole[kind]} for kind in alone]
            blamed = [over for over in blamed if over[0] in (alone or whole)]
        waiting += [{**fixed, over: count} for over in blamed for count in stock.near(counts, over)]
    return answers


def classes(counts: UnitCounts) -> dict[Class, int]:
    """The number of units that stay in the groups of each kind and size; without those of unlike numbers."""
    found: dict[Class, set[int]] = {}
    for group, count in counts.items():
        found.setdefault((group.kind, group.size), set()).add(count)
    return {over: left.pop() for over, left in found.items() if len(left) == 1}


def _key(counts: UnitCounts) -> frozenset[tuple[Axis, int]]:
    return frozenset((g.axis, n) for g, n in counts.items() if n != g.size)


def _masks(groups: Groups, counts: UnitCounts) -> dict[Axis, Mask]:
    """Masks of the right numbers of units; which units stay does not matter here."""
    return {g.axis: np.arange(g.size) < n for g, n in counts.items() if n != g.size and g.axis in groups.by_axis}
