"""Proof by structure of a sheared model, whoever made it: equal programs over equal tensors are equal functions."""

from __future__ import annotations

import torch
from torch import nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.judge import Judge
from shear_backends.module.shear import RECORD, Record, state_of
from shear_backends.verify.structure import Structure
from shear_ir.errors import ShearingError
from shear_ir.frontend.inputs import Inputs
from shear_ir.plans import Plan, original, renumbered
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.rescale_gains import gained
from shear_passes.rewrite.shear import cut_tensor


def by_structure(model: nn.Module, groups: Groups, plan: Plan, small: nn.Module, feed: Inputs) -> Structure:
    """Whether ``small`` is ``model`` sheared, told without numbers: equal tensors, and equal programs on ``feed``.

    Linear in the size of the graph, one tensor at a time. What ``shear`` proved of its result is not proved again,
    while the result's modules are as they were. Raises ``PlanError`` for a plan of another model.
    """
    apart = _tensor_apart(model, plan, small)
    if apart:
        return Structure(False, (), apart)
    record: Record | None = vars(small).get(RECORD)
    if record is not None and record.proof is not None and record.plan is plan and record.state == state_of(small):
        return record.proof
    judge = Judge(model, groups, plan, feed)
    try:
        judge.agrees(small)
    except ShearingError as failure:  # of the dense model at another length
        return Structure(False, (), str(failure))
    return judge.structure


def _tensor_apart(model: nn.Module, plan: Plan, small: nn.Module) -> str:
    """The first tensor of ``small`` that is not what ``plan`` leaves of the dense one; empty where all are."""
    dense, found = named_tensors(model), named_tensors(small)
    if not plan.kept.keys() <= dense.keys():
        return "the plan was made for tensors by other names"
    dense = gained(dense, plan.kept, plan.gains)
    for name, tensor in found.items():
        origin = original(name, plan.gone)
        if origin not in dense:
            return f"the dense model has no {name}"
        cut = cut_tensor(dense[origin], plan.kept.get(origin, {}))
        if cut.shape != tensor.shape or cut.dtype != tensor.dtype:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {cut.dtype} {list(cut.shape)}"
        if not (cut.is_meta or tensor.is_meta) and not torch.equal(cut, tensor.to(cut.device)):
            return f"{name} holds other values than what stays of it"
    left = (renumbered(name, plan.gone) for name in dense)
    return next((f"{name} is missing" for name in left if name is not None and name not in found), "")
