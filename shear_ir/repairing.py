"""Repair without training, on modules: what a plan takes from a model is brought back before it is sheared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from shear_backends.graph import tensors_of
from shear_ir.errors import PlanError
from shear_ir.frontend.base import has_adapters
from shear_ir.pipeline import analyses, groups, planned_program
from shear_ir.plans import Plan
from shear_passes.analysis.consumers import FindConsumers
from shear_passes.importance.base import collect
from shear_passes.importance.calibration import Progress
from shear_passes.importance.scoring import prepared
from shear_passes.repair import FlapBias, LeastSquares, Repair

REPAIRS: Mapping[str, type[Repair]] = {cls.name(): cls for cls in (LeastSquares, FlapBias)}


def repair(
    model: nn.Module, plan: Plan, *repairs: Repair | str, data: Iterable[Any], inputs: Any = None,
    progress: Progress | None = None,
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` whose weights are prepared for ``plan``; shear and verify that copy instead of ``model``.

    ``repairs``: what is done, by name or as objects, one after the other; least squares when none is named. ``data``:
    batches of model inputs, of which one pass takes statistics. Shapes stay as they are, and what the plan leaves
    alone stays bit for bit. Raises ``PlanError`` for a plan of another model, adapters that are not merged, and
    repairs that the model has no room for.
    """
    if has_adapters(model):
        raise PlanError("repair changes base weights, which adapters were trained on: merge them first (merge=True)")
    wanted = [_named(each) for each in repairs] or [LeastSquares()]
    program = planned_program(model, plan, inputs)
    found = groups(program)
    weights = {name: tensors_of(model)[name] for name in program.params if name in tensors_of(model)}
    manager = prepared(
        analyses(program), [], weights=weights, model=model, data=data, progress=progress
    )  # fmt: skip
    collect([each.statistics() for each in wanted], manager)
    changed: dict[str, Tensor] = {}
    for each in wanted:
        statistics, consumers = manager.get(each.statistics()), manager.get(FindConsumers())
        changed |= each.repaired({**weights, **changed}, found, plan, consumers, statistics)
    return _with(model, changed)


def _named(wanted: Repair | str) -> Repair:
    if isinstance(wanted, Repair):
        return wanted
    if wanted not in REPAIRS:
        raise PlanError(f"there is no repair '{wanted}'; there are {', '.join(REPAIRS)}")
    return REPAIRS[wanted]()


def _with(model: nn.Module, changed: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with the ``changed`` tensors in the place of its own."""
    own = tensors_of(model)
    new = {id(own[n]): nn.Parameter(t, requires_grad=own[n].requires_grad) for n, t in changed.items()}
    made: nn.Module = copy.deepcopy(model, dict(new))
    return made
