"""Which groups may lose units: those of the wanted kinds, inside and outside of patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from shear_ir.errors import PlanError
from shear_ir.paths import parent
from shear_passes.analysis.find_groups import Group, Groups

DEFAULT_KINDS = ("ffn", "kv_head")
HEAD_KINDS = ("kv_head", "query_group")


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
            raise PlanError(f"the model has no {kind or 'nameless'} groups; it has {', '.join(sorted(known))}")
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
    owners = {parent(s.parameter) for s in group.slices}
    above = {owner: list(accumulate(owner.split("."), lambda a, b: f"{a}.{b}")) for owner in owners}

    def hit(owner: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, pattern) for path in above[owner] for pattern in patterns)

    return (not only or all(hit(o, only) for o in owners)) and not any(hit(o, skip) for o in owners)
