"""From the units that stay to a Plan: index maps of every tensor and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shear_ir.axes import Axis, Indices, Mask, atoms, evaluate, mask
from shear_ir.errors import PlanError
from shear_ir.manager import Analysis
from shear_ir.plans import Cut, Plan
from shear_passes.analysis.block_groups import BLOCK_KINDS, Gone, gone_with
from shear_passes.analysis.cost import CostModel
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.analysis.weight_norms import cut_gains
from shear_passes.rewrite.rescale_norm import NormFix, norm_fixes


class Selection(Analysis[Plan]):
    """An analysis whose result is a plan; ``Shear`` applies the latest one."""


def build_plan(
    groups: Groups, costs: CostModel, kept: Mapping[Group, Indices], *,
    options: Mapping[str, Any] | None = None, reason: str = "",
) -> Plan:  # fmt: skip
    """The plan in which each group of ``kept`` keeps the given sorted units.

    Groups that go with whole blocks are not cut beside. Raises ``PlanError`` for a group or a block that is frozen,
    for a group that would lose every unit, and when nothing goes.
    """
    cuts: list[Cut] = []
    blocks = [Cut(g.name, g.kind, g.size, np.asarray(kept[g], np.int64)) for g in groups.blocks if g in kept]
    gone = removed(groups, blocks)
    for group, units in kept.items():
        left = group.kind in BLOCK_KINDS or not gone.parameters.issuperset(group.parameters)
        if len(units) == group.size or not left:
            continue
        if not (group.prunable or group.rescalable):
            raise PlanError(f"{group.name} cannot lose units: {group.reason}")
        if not len(units):
            raise PlanError(f"{group.name} would lose all of its {group.size} units")
        why = reason + _because_aligned(group, len(units)) if reason else reason
        cuts.append(Cut(group.name, group.kind, group.size, np.asarray(units, np.int64), group.module, why))
    if not cuts:
        raise PlanError("the plan removes nothing")
    masks = masks_of(groups, cuts)
    names = groups.names_without(gone)
    kept_of = _kept(groups, masks, gone)
    return Plan(
        digest=groups.program.digest,
        model=groups.program.owner,
        cuts=tuple(cuts),
        kept=kept_of,
        before=costs.now,
        after=costs.at({atom: int(m.sum()) for atom, m in masks.items()}, gone),
        frozen={g.name: g.reason for g in groups if not g.prunable},
        options=dict(options or {}),
        gone=gone.modules,
        names=_renames(names),
        routers=_routers(groups, masks, gone),
        gains=cut_gains(groups.program, kept_of),
        notes=tuple(_uneven(cuts)),
    )


def _require_aligned(groups: Groups, masks: Mapping[Axis, Mask]) -> None:
    """Raise ``PlanError`` where a kernel could not run what is left, as in another precision than the plan's."""
    for dim, _, needed in groups.axes.aligned:
        left = evaluate(dim, lambda a: int(masks[a].sum()) if a in masks else a.size)
        if dim.size % needed == 0 and left % needed:
            cut = next(groups.label(a) for a in atoms(dim) if a in masks)
            raise PlanError(
                f"the plan leaves {left} of the {dim.size} channels of {cut}, and the kernel for products by groups "
                f"wants a multiple of {needed} in this precision: plan for the model as it is, or with "
                f"round_to={needed}"
            )


def _because_aligned(group: Group, count: int) -> str:
    aligned = group.multiple > 1 and count % group.multiple == 0
    return f"; a multiple of {group.multiple}, as the kernel for products by groups wants" if aligned else ""


def _uneven(cuts: Sequence[Cut]) -> Iterator[str]:
    """A sentence where layers that had equal numbers of experts keep unlike ones."""
    left: dict[int, set[int]] = {}
    for cut in cuts:
        if cut.kind == "expert":
            left.setdefault(cut.size, set()).add(len(cut.kept))
    for size, counts in left.items():
        if len(counts) > 1:
            yield (
                f"layers of {size} experts keep from {min(counts)} to {max(counts)}: losses over all routers at once, "
                "as output_router_logits=True asks for, want equal numbers; allocation='uniform' keeps them equal"
            )


def _renames(names: Mapping[str, str]) -> dict[str, str]:
    """The groups whose name changes."""
    return {small: name for small, name in names.items() if small != name}


def _routers(groups: Groups, masks: Mapping[Axis, Mask], gone: Gone) -> dict[str, int]:
    """The tensors that score the units of the cut axes, with the dim they are in."""
    scored = {name: dim for axis in masks for name, dim in groups.zeros.routers.get(axis, {}).items()}
    return {name: dim for name, dim in scored.items() if name not in gone.parameters}


def removed(groups: Groups, cuts: Sequence[Cut]) -> Gone:
    """What goes with the blocks that these cuts remove; raises ``PlanError`` for a block that cannot go."""
    units = groups.units(cuts)
    for unit in units:
        if unit.reason:
            raise PlanError(f"{unit.path} cannot be removed: {unit.reason}")
    return gone_with(groups.program, units)


@dataclass(frozen=True, eq=False)
class CheckedPlan:
    """A plan as it applies to some groups, made once, where it was checked.

    ``masks``: which units of each cut axis stay; ``gone``: what goes with whole blocks.
    """

    groups: Groups
    plan: Plan
    masks: Mapping[Axis, Mask]
    gone: Gone

    @cached_property
    def norms(self) -> tuple[NormFix, ...]:
        """What the norms over cut axes need; raises ``ShearingError`` for one that no rescaling mends."""
        return tuple(norm_fixes(self.groups, self.masks))


def checked(groups: Groups, plan: Plan) -> CheckedPlan:
    """``plan``, checked against ``groups``; raises ``PlanError``. Whoever asks next for the same two gets the same."""
    known: CheckedPlan | None = vars(groups).get(_CHECKED)
    if known is None or known.plan is not plan:
        known = CheckedPlan(groups, plan, *_checked(groups, plan))
        vars(groups)[_CHECKED] = known
    return known


_CHECKED = "_checked_plan"
"""Where groups keep the plan that was last checked against them."""


def _checked(groups: Groups, plan: Plan) -> tuple[dict[Axis, Mask], Gone]:
    """The masks of a plan that may have been edited, and what goes with its blocks.

    Raises ``PlanError`` unless it was made for these shapes and its index maps are those of its cuts.
    """
    plan.require(groups.program.digest)
    masks = masks_of(groups, plan.cuts)
    _require_aligned(groups, masks)
    gone = removed(groups, plan.cuts)
    if sorted(gone.modules) != sorted(plan.gone):
        raise PlanError("the plan contradicts itself: the modules that are gone are not those that its cuts remove")
    expected = _kept(groups, masks, gone)
    for name in dict.fromkeys((*expected, *plan.kept)):
        mine, given = expected.get(name, {}), plan.kept.get(name, {})
        if mine.keys() != given.keys() or any(not np.array_equal(mine[d], given[d]) for d in mine):
            raise PlanError(f"the plan contradicts itself: what it keeps of {name} is not what its cuts leave")
    if dict(plan.routers) != _routers(groups, masks, gone):
        raise PlanError("the plan contradicts itself: its routers are not those of the experts that it cuts")
    if dict(plan.gains) != cut_gains(groups.program, expected):
        raise PlanError("the plan contradicts itself: its gains are not those of the normalised weights that it cuts")
    if gone.modules and _renames(plan.names) != _renames(groups.names_without(gone)):
        raise PlanError("the plan contradicts itself: its names are not those of the groups that are left")
    return masks, gone


def masks_of(groups: Groups, cuts: list[Cut] | tuple[Cut, ...]) -> dict[Axis, Mask]:
    """Which units of each axis stay; raises ``PlanError`` for a cut that does not fit the groups."""
    masks: dict[Axis, Mask] = {}
    seen: set[str] = set()
    for cut in cuts:
        group = groups.by_name.get(cut.group)
        if cut.group in seen:
            raise PlanError(f"the plan cuts {cut.group} twice")
        seen.add(cut.group)
        if group is None or group.size != cut.size or group.kind != cut.kind:
            found = f"has {group.size} {group.kind} units" if group else "does not exist"
            raise PlanError(f"the plan cuts {cut.group} ({cut.size} {cut.kind} units), which in this model {found}")
        if not len(cut.kept):
            raise PlanError(f"the plan removes all {cut.size} units of {cut.group}")
        if cut.kind in BLOCK_KINDS:  # their axis is in no tensor
            continue
        stays = np.zeros(cut.size, dtype=bool)
        stays[cut.kept] = True
        masks[group.axis] = stays
    _require_choices(groups, masks)
    return masks


def _require_choices(groups: Groups, masks: Mapping[Axis, Mask]) -> None:
    """Raise ``PlanError`` where fewer units would be left than are chosen for every token."""
    sizes = {axis: int(stays.sum()) for axis, stays in masks.items()}
    for choice in groups.zeros.choices:
        cut = [groups.by_axis[a] for a in atoms(choice.over) if a in masks]
        left = choice.open(sizes)
        if cut and left < choice.count:
            raise PlanError(
                f"the plan leaves {sizes[cut[0].axis]} of the {cut[0].size} units of {cut[0].name}, and so {left} to "
                f"choose from, but %{choice.node} chooses {choice.count} for every token"
            )


def _kept(groups: Groups, masks: Mapping[Axis, Mask], gone: Gone) -> dict[str, dict[int, Indices]]:
    touched = {(s.parameter, s.dim): s.expression for g in groups if g.axis in masks for s in g.slices}
    # Dims of one expression, such as gate, up and down of an MLP, share one array.
    stays = {expression: np.flatnonzero(mask(expression, masks)) for expression in set(touched.values())}
    kept: dict[str, dict[int, Indices]] = {}
    for name in (n for n in groups.program.params if n not in gone.parameters):
        # Constants belong to the program and are cut with it; a model has no tensor of that name.
        dims = () if groups.program.params[name].kind == "constant" else groups.axes.of_param[name]
        for dim in range(len(dims)):
            if (name, dim) in touched:
                kept.setdefault(name, {})[dim] = stays[touched[name, dim]]
    return kept
