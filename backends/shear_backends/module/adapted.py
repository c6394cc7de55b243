"""Shearing a PEFT model: its base as if it were alone, and the adapters after it; kept, or merged into it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.adapters import follow, merged_kept, require_lora, settle
from shear_backends.module.shear import ModuleChanges, build, cut_by_id, find_changes, recorded, with_copies
from shear_backends.verify.numbers import difference, evaluation, run, verify
from shear_backends.verify.sides import Side
from shear_ir.errors import PlanError, ShearingError
from shear_ir.frontend.base import BaseView, base_view, has_adapters, root_path
from shear_ir.frontend.feeds import inputs_of
from shear_ir.frontend.inputs import Inputs, as_inputs, example_inputs
from shear_ir.plans import Kept, Plan
from shear_passes.analysis.cost import CostModel
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.rewrite.cuts import build_plan, checked
from shear_passes.rewrite.rescale_norm import NormFix

_MERGED = 64.0
"""Of the model's own rounding: how far a merged one may be, whose weights are rounded as its activations are."""


def shear_adapted(
    model: nn.Module, base: nn.Module, groups: Groups, base_plan: Plan, plan: Plan, inputs: Any = None
) -> nn.Module:
    """A new PEFT model on the sheared base, with its adapters cut alike and everything PEFT notes about them true.

    ``base``, ``groups`` and ``base_plan`` are those of the base alone; ``plan``: the plan of the whole model, or
    ``base_plan`` again. Raises as ``shear_module`` does, and ``ShearingError`` for adapters other than LoRA.
    """
    require_lora(model)
    kept = merged_kept(model, follow(model, base_plan.kept), {} if plan is base_plan else plan.kept)
    recipe = find_changes(base, groups, base_plan, inputs)
    here = _here(recipe, base_view(model))
    routers = routers_here(model, base_plan) if plan is base_plan else plan.routers
    gains = gains_here(model, base_plan) if plan is base_plan else plan.gains
    whole = replace(plan, kept=kept, routers=routers, gains=gains)
    small = build(model, with_copies(model, cut_by_id(model, whole, here.norms)), here)
    settle(small)
    if not any(t.is_meta for t in named_tensors(model).values()):
        feed = example_inputs(model) if inputs is None else as_inputs(base, inputs)
        report = verify(model, small, whole, feed)
        if not report.sound:
            raise ShearingError(
                f"the adapters do not follow their base: the outputs differ by {report.max_abs_diff:.3g}"
            )
    recorded(small.get_submodule(root_path(small)), base, base_plan, recipe)
    return recorded(small, model, whole, here)


def plan_of_base(plan: Plan, groups: Groups, base: Groups, costs: CostModel, view: BaseView) -> Plan:
    """The part of a PEFT model's plan that cuts its base, as a plan of the base alone; it may cut nothing.

    ``groups``: those of the PEFT model; ``base`` and ``costs``: those of its base. Raises ``PlanError`` when the base
    alone has no such groups.
    """
    checked(groups, plan)
    names = {name: own for own, (name, *_) in view.tensors.items()}
    kept = {}
    for cut in plan.cuts:
        group = groups.by_name[cut.group]
        if any(s.parameter in names for s in group.slices):
            kept[_same(group, base, names)] = cut.kept
    if not kept:
        return replace(
            plan, digest=base.program.digest, model=base.program.owner, cuts=(), kept={}, routers={}, gains={},
            before=costs.now, after=costs.now,
        )  # fmt: skip
    made = build_plan(base, costs, kept, options=plan.options, reason=plan.cuts[0].reason)
    for own, dims in made.kept.items():
        given: Mapping[int, Any] = plan.kept.get(view.tensors.get(own, (own,))[0], {})
        if own in view.tensors and any(d in given and not np.array_equal(dims[d], given[d]) for d in dims):
            raise PlanError(f"the plan of the PEFT model keeps other indices of {own} than a plan of its base would")
    return made


def kept_here(model: nn.Module, plan: Plan) -> Kept:
    """The index maps of ``plan`` by the names of ``model``, when it was made for the base of a PEFT model."""
    if not has_adapters(model):
        return plan.kept
    known = named_tensors(model)
    view = base_view(model)
    of_base = [name for name in plan.kept if name in view.tensors and name not in known]
    return follow(model, plan.kept) if of_base else plan.kept


def routers_here(model: nn.Module, plan: Plan) -> dict[str, int]:
    """The tensors that score experts by the names of ``model``, when ``plan`` was made for the base of a PEFT model."""
    if not has_adapters(model):
        return dict(plan.routers)
    known, names = named_tensors(model), base_view(model).tensors
    return {n: dim for own, dim in plan.routers.items() for n in ((own,) if own in known else names.get(own, ()))}


def gains_here(model: nn.Module, plan: Plan) -> dict[str, str]:
    """The gains of normalised weights, each with its v, by the names of ``model``; as ``routers_here``."""
    if not has_adapters(model):
        return dict(plan.gains)
    known, names = named_tensors(model), base_view(model).tensors

    def here(own: str) -> tuple[str, ...]:
        return (own,) if own in known else tuple(names.get(own, ()))

    return {g: v for own, of in plan.gains.items() for g, v in zip(here(own), here(of), strict=True)}


def merged(model: nn.Module) -> nn.Module:
    """The base of ``model`` with its active adapters merged in fp32; ``model`` itself is used up.

    Raises ``ShearingError`` for adapters that cannot be merged or when the merged model computes something else.
    """
    require_lora(model)
    feed = None if any(t.is_meta for t in named_tensors(model).values()) else inputs_of(model)
    kinds = {own: named_tensors(model)[name].dtype for own, (name, *_) in base_view(model).tensors.items()}
    for param in model.parameters():
        param.data = param.data.float() if param.dtype in (torch.float16, torch.bfloat16) else param.data
    expected = _predicted(model, feed)
    noise = _rounding(model, feed, expected)
    _untie(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied embeddings, which are untied here
            plain: nn.Module = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except (ValueError, RuntimeError) as failure:
        raise ShearingError(f"the adapters cannot be merged: {str(failure).splitlines()[0]}") from failure
    found = _predicted(plain, feed)
    gap = difference(expected, found)
    # A merged weight is rounded once; what that does to the outputs is of the size of the model's own rounding.
    if not gap <= _MERGED * noise:
        raise ShearingError(f"the merged model's outputs differ by {gap:.3g}, where rounding explains {noise:.3g}")
    for name, param in plain.named_parameters():
        param.data = param.data.to(kinds.get(name, param.dtype))
    return plain


def _here(recipe: ModuleChanges, view: BaseView) -> ModuleChanges:
    """The recipe of a base for the PEFT model around it, where copies of modules follow their originals."""
    return ModuleChanges(
        recipe.config,
        {path: dict(values) for own, values in recipe.attributes.items() for path in view.modules[own]},
        tuple(fix for own in recipe.norms for fix in _fixes(own, view)),
        tuple(replace(g, module=path) for g in recipe.gathers for path in view.modules[g.module]),
        tuple(replace(f, module=path) for f in recipe.fits for path in view.modules[f.module]),
    )


def _fixes(fix: NormFix, view: BaseView) -> list[NormFix]:
    places = zip(view.modules[fix.module], view.tensors[fix.parameter], strict=True)
    return [replace(fix, module=module, parameter=parameter) for module, parameter in places]


def _same(group: Group, base: Groups, names: Mapping[str, str]) -> Group:
    """The group of the base that owns the same indices of the same tensors."""
    for mine in (s for s in group.slices if s.parameter in names):
        for other in base:
            for theirs in other.slices:
                if (theirs.parameter, theirs.dim) != (names[mine.parameter], mine.dim) or other.size != group.size:
                    continue
                if len(mine.index_map) == len(theirs.index_map) and all(
                    np.array_equal(a, b) for a, b in zip(mine.index_map, theirs.index_map, strict=True)
                ):
                    return other
    raise PlanError(f"{group.name} is no group of the base alone, whose tensors are tied in another way")


def _untie(model: nn.Module) -> None:
    """Give each adapted weight that the base uses in a second place a copy of its own: that place is not adapted."""
    from peft.tuners.lora import LoraLayer

    owners: dict[int, int] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners[id(tensor)] = owners.get(id(tensor), 0) + bool(name)
    layers: list[Any] = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and owners[id(weight)] > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)


def _predicted(model: nn.Module, feed: Inputs | None) -> tuple[torch.Tensor, ...]:
    """What ``model`` says, computed in float64; nothing without a feed."""
    if feed is None:
        return ()
    with evaluation(model):
        return Side.of(model).ask(run, feed, torch.float64)


def _rounding(model: nn.Module, feed: Inputs | None, exact: Sequence[torch.Tensor]) -> float:
    """How far ``model`` in float32 is from what it says in float64."""
    if feed is None:
        return 0.0
    with evaluation(model):
        return difference(exact, Side.of(model).ask(run, feed, torch.float32))
