"""Criteria of the user's own: a function of a group and what is known, or a class, by import path or entry point."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shear_ir.errors import PlanError, ShearError
from shear_ir.frontend.sentences import sentence
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.consumers import Consumers, FindConsumers
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import Importance, Score, Scored, Scores, candidates, checked, weights_of
from shear_passes.importance.calibration import Calibration, Data
from shear_passes.importance.gradients import Gradients, GradientStatistics
from shear_passes.importance.statistics import CalibrationStatistics, ReadStatistics


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a function may score a group by. Each part is made when it is asked for, once for all groups."""

    program: Program
    analyses: AnalysisManager

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Tensors by name; raises ``PlanError`` when they are not at hand."""
        return weights_of(self.analyses, "this criterion")

    @property
    def consumers(self) -> Consumers:
        """Who reads what: ``consumers.of(group)``."""
        return self.analyses.get(FindConsumers())

    @property
    def reads(self) -> CalibrationStatistics:
        """Moments of what each consumer reads; raises ``PlanError`` without data."""
        return self.analyses.get(ReadStatistics())

    @property
    def gradients(self) -> Gradients:
        """The mean gradient by parameter; raises ``PlanError`` without data or a loss."""
        return self.analyses.get(GradientStatistics())

    @property
    def calibration(self) -> Calibration:
        """Model and batches, for a pass of one's own; raises ``PlanError`` without data."""
        return self.analyses.get(Data())


_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

Function = Callable[[Group, Evidence], Any]
"""From a group to a number for each of its units; None for a group that it cannot score."""


@dataclass(frozen=True)
class Custom(Importance):
    """The scores that a function gives: ``def criterion(group, evidence)``, found at ``path``, ``package.module:name``.

    It returns an array of shape ``(group.size,)``, the least important unit the lowest, or None.
    """

    path: str
    function: Function | None = field(default=None, repr=False)

    requires = (FindGroups, FindConsumers, ReadStatistics, GradientStatistics, Data)

    @property
    def blind(self) -> bool:
        """What a function looks at is its own business."""
        return False

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` when the function is not there or returns something else."""
        function = self.function or find(self.path)
        evidence = Evidence(program, analyses)
        scores: dict[Group, Score] = {}
        reasons: dict[Group, str] = {}
        for group in candidates(analyses):
            made = self._asked(function, group, evidence)
            if made is None:
                reasons[group] = "it gives None"
            else:
                scores[group] = checked(self.path, group, made)
        return Scored(self.path, scores, reasons)

    def _asked(self, function: Function, group: Group, evidence: Evidence) -> Any:
        try:
            return function(group, evidence)
        except ShearError:
            raise
        except Exception as failure:  # whatever it raises is the user's own
            said = f"{type(failure).__name__}: {sentence(failure)}"
            raise PlanError(f"the criterion {self.path} fails on {group.name} ({group.kind}): {said}") from failure


def find(path: str) -> Any:
    """What ``package.module:name`` names, also beside the current folder; raises ``PlanError``."""
    if not _PATH.fullmatch(path):
        raise PlanError(f"the criterion '{path}' is no import path: write package.module:name")
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as failure:
        raise PlanError(f"the criterion {path} cannot be imported: {sentence(failure)}") from failure
    for part in name.split("."):
        if not hasattr(found, part):
            raise PlanError(f"{module} has no {name}, which the criterion {path} names")
        found = getattr(found, part)
    return found


def as_criterion(given: Any, path: str = "") -> Importance:
    """A criterion, a class of criteria, or a function as a criterion; raises ``PlanError`` for anything else."""
    if isinstance(given, Importance):
        return given
    name = path or f"{getattr(given, '__module__', '')}:{getattr(given, '__qualname__', type(given).__name__)}"
    if isinstance(given, type):
        try:
            given = given()
        except TypeError as failure:
            raise PlanError(
                f"the criterion {name} needs options: an object, or on the command line NAME{{option=value}}"
            ) from failure
        if isinstance(given, Importance):
            return given
    if not callable(given):
        raise PlanError(f"{name} is a {type(given).__name__}: a criterion is a name, a function or an Importance")
    return Custom(name, given)
