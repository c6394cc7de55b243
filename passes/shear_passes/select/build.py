"""From the units that stay to a Plan: index maps of every tensor and what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shear_ir.axes import Axis, Indices, Mask, mask
from shear_ir.errors import PlanError
from shear_ir.manager import Analysis
from shear_ir.plans import Cut, Plan
from shear_passes.analysis.cost import CostModel
from shear_passes.analysis.find_groups import Group, Groups


class Selection(Analysis[Plan]):
    """An analysis whose result is a plan; ``Shear`` applies the latest one."""


def build_plan(
    groups: Groups, costs: CostModel, kept: Mapping[Group, Indices], *,
    options: Mapping[str, Any] | None = None, reason: str = "",
) -> Plan:  # fmt: skip
    """The plan in which each group of ``kept`` keeps the given sorted units.

    Raises ``PlanError`` for a group that is frozen, for one that would lose every unit, and when nothing goes.
    """
    cuts = []
    for group, units in kept.items():
        if len(units) == group.size:
            continue
        if not (group.prunable or group.rescalable):
            raise PlanError(f"{group.name} cannot lose units: {group.reason}")
        if not len(units):
            raise PlanError(f"{group.name} would lose all of its {group.size} units")
        cuts.append(Cut(group.name, group.kind, group.size, np.asarray(units, np.int64), group.module, reason))
    if not cuts:
        raise PlanError("the plan removes nothing")
    masks = masks_of(groups, cuts)
    return Plan(
        digest=groups.program.digest,
        model=groups.program.owner,
        cuts=tuple(cuts),
        kept=_kept(groups, masks),
        before=costs.now,
        after=costs.at({atom: int(m.sum()) for atom, m in masks.items()}),
        frozen={g.name: g.reason for g in groups if not g.prunable},
        options=dict(options or {}),
    )


def checked_masks(groups: Groups, plan: Plan) -> dict[Axis, Mask]:
    """The masks of a plan that may have been edited.

    Raises ``PlanError`` unless it was made for these shapes and its index maps are those of its cuts.
    """
    plan.require(groups.program.digest)
    masks = masks_of(groups, plan.cuts)
    expected = _kept(groups, masks)
    for name in dict.fromkeys((*expected, *plan.kept)):
        mine, given = expected.get(name, {}), plan.kept.get(name, {})
        if mine.keys() != given.keys() or any(not np.array_equal(mine[d], given[d]) for d in mine):
            raise PlanError(f"the plan contradicts itself: what it keeps of {name} is not what its cuts leave")
    return masks


def masks_of(groups: Groups, cuts: list[Cut] | tuple[Cut, ...]) -> dict[Axis, Mask]:
    """Which units of each axis stay; raises ``PlanError`` for a cut that does not fit the groups."""
    masks: dict[Axis, Mask] = {}
    for cut in cuts:
        group = groups.by_name.get(cut.group)
        if group is not None and group.axis in masks:
            raise PlanError(f"the plan cuts {cut.group} twice")
        if group is None or group.size != cut.size or group.kind != cut.kind:
            found = f"has {group.size} {group.kind} units" if group else "does not exist"
            raise PlanError(f"the plan cuts {cut.group} ({cut.size} {cut.kind} units), which in this model {found}")
        if not len(cut.kept):
            raise PlanError(f"the plan removes all {cut.size} units of {cut.group}")
        stays = np.zeros(cut.size, dtype=bool)
        stays[cut.kept] = True
        masks[group.axis] = stays
    return masks


def _kept(groups: Groups, masks: Mapping[Axis, Mask]) -> dict[str, dict[int, Indices]]:
    touched = {(s.parameter, s.dim): s.expression for g in groups if g.axis in masks for s in g.slices}
    # Dims of one expression, such as gate, up and down of an MLP, share one array.
    stays = {expression: np.flatnonzero(mask(expression, masks)) for expression in set(touched.values())}
    kept: dict[str, dict[int, Indices]] = {}
    for name in groups.program.params:
        # Constants belong to the program and are cut with it; a model has no tensor of that name.
        dims = () if groups.program.params[name].kind == "constant" else groups.axes.of_param[name]
        for dim in range(len(dims)):
            if (name, dim) in touched:
                kept.setdefault(name, {})[dim] = stays[touched[name, dim]]
    return kept
