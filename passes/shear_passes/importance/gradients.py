"""The gradient of the calibration loss, kept once per element: its mean, and the mean of the squares of rows' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance.base import Statistic, candidates, parameters_of
from shear_passes.importance.calibration import Calibration, CalibrationStep, Data, Observer, Portion


@dataclass(frozen=True, eq=False)
class Gradients:
    """By parameter, in fp32 and in the parameter's shape; ``squares`` is empty where it was not asked for."""

    mean: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]


@dataclass(frozen=True)
class GradientStatistics(Statistic[Gradients]):
    """The gradient of the mean loss over all tokens that count, however they lie in rows and batches.

    With ``squares`` also the mean over rows of the square of the row's own gradient; a row weighs as many as it has
    tokens that count. Takes the memory of one more copy of the scored parameters in fp32 (two with ``squares``),
    whatever the data.
    """

    squares: bool = False

    requires = (FindGroups, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> GradientObserver:
        """Hooks on the parameters that groups own slices of."""
        names = parameters_of(program, candidates(analyses))
        return GradientObserver(trainable(calibration.model, program, names), self.squares)


def trainable(model: nn.Module, program: Program, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The tensors of ``model`` by their names in ``program``; raises ``PlanError`` for one that takes no gradient."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name in names:
        tensor = next((tensors[n] for n in (name, *program.params[name].aliases) if n in tensors), None)
        if tensor is None:
            raise PlanError(f"the model that the data is for has no parameter {name}: it is not the traced one")
        if tensor.is_meta or not tensor.is_floating_point():
            raise PlanError(f"{name} is not here as numbers that take a gradient (offloaded or quantised)")
        found[name] = tensor
    return found


class GradientObserver(Observer):
    """Adds each gradient to its sum as soon as it is made, so that those of all parameters never lie side by side."""

    backward = True

    def __init__(self, tensors: Mapping[str, nn.Parameter], squares: bool) -> None:
        self.tensors = tensors
        self.wants_squares = squares
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.weight = 0

    def portion(self, calibration: Calibration) -> Portion:
        """Rows for their squares; else any, where it is known what the mean loss of a batch is the mean over."""
        if self.wants_squares:
            return "rows"
        return "any" if calibration.knows_weights else "whole"

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        """The watched parameters ask for gradients."""
        for name, tensor in self.tensors.items():
            calibration.on_gradient(tensor, partial(self._take, calibration, name))
        yield

    def _take(self, calibration: Calibration, name: str, grad: Tensor) -> None:
        # The loss is a mean over a portion; over all data everything that counts counts the same.
        grad = grad.float()
        _add(self.sums, name, grad * calibration.weight)
        if self.wants_squares:
            _add(self.squares, name, grad.square() * calibration.weight)

    def after(self, step: CalibrationStep) -> None:
        """Counts what counts."""
        self.weight += step.weight

    def finish(self) -> Gradients:
        """Means; a parameter that the loss does not reach has gradient zero."""
        mean = {n: self.sums.get(n, torch.zeros_like(t, dtype=torch.float32)) for n, t in self.tensors.items()}
        squares = {n: self.squares.get(n, torch.zeros_like(m)) for n, m in mean.items()} if self.wants_squares else {}
        for tensor in (*mean.values(), *squares.values()):
            tensor.div_(max(self.weight, 1))
        return Gradients(mean, squares)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name].add_(value)
    else:
        sums[name] = value
