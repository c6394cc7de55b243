"""From what a user asks for to a manager that can score it: the criterion, the data, one pass for all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Program
from shear_passes.importance.base import Importance, Statistic, collect
from shear_passes.importance.calibration import Calibration, Data, LossFunction, Progress
from shear_passes.importance.custom import Function, as_criterion
from shear_passes.importance.names import blind_costs, criterion, default

CriterionLike = str | Importance | type[Importance] | Function
"""A criterion by name, as an object, as a class, or as a function of a group and what is known of it."""


def chosen(wanted: CriterionLike | None, program: Program, data: Any, seed: int = 0) -> Importance:
    """The criterion that is wanted, or the default; warns where that is magnitude and the model reads tokens.

    Raises ``PlanError`` for a criterion that there is not.
    """
    if wanted is None:
        wanted = default(data)
        tokens = any(not t.dtype.is_floating_point for t in program.input_types.values())
        if data is None and tokens:
            warnings.warn(blind_costs(wanted), UserWarning, stacklevel=3)
    return criterion(wanted, seed) if isinstance(wanted, str) else as_criterion(wanted)


def prepared(
    manager: AnalysisManager,
    criteria: Sequence[Importance],
    *,
    weights: Mapping[str, Tensor] | None,
    model: nn.Module | None,
    data: Iterable[Any] | None,
    loss: LossFunction | None = None,
    progress: Progress | None = None,
    without: tuple[type[Analysis[Any]], ...] = (),
) -> AnalysisManager:
    """A fork of ``manager`` in which all ``criteria`` can be scored, after one pass over ``data`` for all of them.

    Weights change while a model trains, so scores and statistics are never kept from one call to the next. Raises
    ``PlanError`` when data is wanted and there is none, or no model to run on it.
    """
    stale: tuple[Any, ...] = (Importance, Statistic, Data, *without)
    fork = manager.fork(weights, without=stale)
    if data is None:
        return fork
    if model is None:
        raise PlanError("the model of this program is gone, and data is to be run through it: trace the model again")
    fork.put(Data(), Calibration(model, data, loss, progress))
    collect([s for c in criteria for s in c.statistics()], fork)
    return fork
