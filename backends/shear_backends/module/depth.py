"""The module backend for plans that remove layers: the layers first, then what the plan cuts of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.config_inference import infer_config
from shear_backends.module.judge import Judge
from shear_backends.module.layers import drop_layers, staying
from shear_backends.module.shear import (
    ModuleChanges,
    build,
    cut_by_id,
    find_changes,
    recorded,
    require_exact,
    with_copies,
)
from shear_backends.verify.masked_blocks import block_cuts
from shear_ir.errors import ShearingError
from shear_ir.frontend.export import trace
from shear_ir.frontend.inputs import Inputs, as_inputs, example_inputs
from shear_ir.frontend.unchanged import copied
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan, renumbered
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.rewrite.cuts import checked, masks_of
from shear_passes.rewrite.raise_lora import raise_lora
from shear_passes.rewrite.rescale_norm import norm_fixes

_NONE = "no config of the class has these sizes"


def shear_layers(model: nn.Module, groups: Groups, plan: Plan, inputs: Any = None) -> nn.Module:
    """A new model of the same class without the layers that ``plan`` removes, and with its other cuts.

    Raises ``PlanError`` for a plan of another model and ``ShearingError`` where modules cannot say it: for blocks
    that are parts of a layer, and where a layer does more for others than its place in the list shows.
    """
    require_exact(model)
    checked(groups, plan)
    part = next((unit for unit in groups.units(plan.cuts) if not unit.whole), None)
    if part is not None:
        raise ShearingError(f"{part.path} is a part of what its layer's forward adds up: use the graph backend")
    feed = example_inputs(model) if inputs is None else as_inputs(model, inputs)
    dropped, exact = without_layers(model, plan)
    _require_function(model, dropped, groups, plan, feed)
    later = _cuts_of_the_rest(plan)
    recipe = ModuleChanges(dropped.config if exact else None)
    if later.cuts:
        found = AnalysisManager(_traced(dropped, feed)).get(FindGroups())
        later = replace(later, digest=found.program.digest)
        recipe = find_changes(dropped, found, later, feed)
    small = build(dropped, with_copies(dropped, cut_by_id(dropped, later, recipe.norms)), recipe)
    return recorded(small, model, plan, recipe if exact else replace(recipe, config=None))


def without_layers(model: nn.Module, plan: Plan) -> tuple[nn.Module, bool]:
    """A copy of ``model`` without the layers, over the same tensors; whether its own config builds it."""
    staying(model, plan.gone)
    dropped = copied(model, {id(t): t for t in named_tensors(model).values()})
    return dropped, drop_layers(dropped, plan.gone, model)


def foreseen(model: nn.Module, groups: Groups, plan: Plan) -> tuple[bool, str]:
    """Whether a config of the class will build what ``plan`` leaves, and why not, without shearing anything."""
    try:
        dropped, exact = without_layers(model, plan)
        later = _cuts_of_the_rest(plan)
        if exact and later.cuts:
            found = AnalysisManager(_traced(dropped, example_inputs(dropped))).get(FindGroups())
            masks = masks_of(found, later.cuts)
            inferred = infer_config(dropped, found, masks, later.kept, tuple(norm_fixes(found, masks)))
            return inferred.config is not None, inferred.refused or _NONE
    except ShearingError as failure:
        return False, str(failure)
    return exact, "" if exact else _NONE


def _require_function(model: nn.Module, dropped: nn.Module, groups: Groups, plan: Plan, feed: Inputs) -> None:
    alone = replace(plan, cuts=tuple(block_cuts(plan.cuts)), kept={}, routers={})
    judge = Judge(model, groups, alone, feed)
    if not judge.agrees(dropped, lambda dense: without_layers(dense, plan)[0]):
        judge.require_trace()
        raise ShearingError(
            f"{type(model).__name__} without {', '.join(plan.gone)} does not compute the function of the graph without "
            f"them{judge.why}: others rely on these layers; use the graph backend, or leave them"
        )


def _cuts_of_the_rest(plan: Plan) -> Plan:
    """What the plan cuts of the layers that stay, by the names they get."""
    small = {name: own for own, name in plan.names.items()}
    blocks = block_cuts(plan.cuts)
    kept = {renumbered(name, plan.gone) or name: dims for name, dims in plan.kept.items()}
    cuts = tuple(replace(c, group=small.get(c.group, c.group)) for c in plan.cuts if c not in blocks)
    routers = {renumbered(name, plan.gone) or name: dim for name, dim in plan.routers.items()}
    gains = {renumbered(g, plan.gone) or g: renumbered(v, plan.gone) or v for g, v in plan.gains.items()}
    return replace(plan, cuts=cuts, kept=kept, gone=(), names={}, routers=routers, gains=gains)


def _traced(model: nn.Module, feed: Inputs) -> Program:
    return raise_lora(trace(model, feed))
