"""Streaming statistics of what consumers read: sums over tokens, whose memory depends on widths alone.

One pass serves every criterion, and the repair of consumers by least squares, which needs ``X^T X``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.consumers import Consumer, Consumers, FindConsumers, Key
from shear_passes.importance.base import Statistic
from shear_passes.importance.calibration import Calibration, Data, Observer
from shear_passes.importance.products import ProductWatch

_AT_ONCE = 1 << 20
"""Numbers of a batch that are looked at at once."""


@dataclass(eq=False)
class Moments:
    """Sums over the tokens of one input with ``features`` features, all in fp64 on the device of the input.

    ``count``: tokens; ``rows``: sequences. ``mean`` and ``deviations`` (sum of squares around the mean) have shape
    ``(features,)``; so has ``row_means``, the sum over sequences of the square of the sequence's mean of abs(x).
    ``gram``: ``X^T X``, shape ``(features, features)``, where it was asked for.
    """

    count: int = 0
    rows: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    deviations: Tensor = field(default_factory=lambda: torch.zeros(0))
    row_means: Tensor = field(default_factory=lambda: torch.zeros(0))
    gram: Tensor | None = None

    @property
    def squares(self) -> Tensor:
        """``sum over tokens of x^2``, shape ``(features,)``."""
        return self.deviations + self.count * self.mean.square()

    @property
    def variance(self) -> Tensor:
        """``mean over tokens of (x - mean)^2``, shape ``(features,)``."""
        return self.deviations / max(self.count, 1)

    def of(self, features: slice) -> Moments:
        """Those of some of the features, without their products."""
        seen = [each[features] for each in (self.mean, self.deviations, self.row_means)]
        return Moments(self.count, self.rows, *seen)

    def update(self, x: Tensor, valid: Tensor | None = None, gram: bool = False) -> None:
        """Add a batch of shape ``(sequences, tokens, features)``; ``valid`` (sequences, tokens) leaves out padding.

        Means are combined as by Chan, Golub and LeVeque (1983), so that large means do not eat small variances.
        """
        # A few sequences at a time, since there are several copies of them in higher precision.
        step = max(1, _AT_ONCE // max(1, x[0].numel())) if len(x) else 1
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            self._update(x[rows].detach(), None if valid is None else valid[rows], gram)

    def _update(self, x: Tensor, valid: Tensor | None, gram: bool) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        weight = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device) if valid is None else valid.to(x)
        tokens = weight.sum(1)
        if not (count := int(tokens.sum())):
            return
        weight = weight[..., None]
        each = (x.abs() * weight).sum(1) / tokens.clamp_min(1)[:, None]
        mean = (x * weight).double().sum((0, 1)) / count
        deviations = ((x - mean.to(x)).square() * weight).double().sum((0, 1))
        # What rounding the mean to the type of x has added.
        deviations -= count * (mean - mean.to(x).double()).square()
        self._merge(count, mean, deviations)
        self.row_means = self._grown(self.row_means, mean) + each.double().square().sum(0)
        self.rows += int((tokens > 0).sum())
        if gram:
            flat = (x * weight).flatten(0, 1)
            made = (flat.T @ flat).double()
            self.gram = made if self.gram is None else self.gram.add_(made)

    def _merge(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        total = self.count + count
        before, spread = self._grown(self.mean, mean), self._grown(self.deviations, mean)
        shift = mean - before
        self.mean = before + shift * (count / total)
        self.deviations = spread + deviations + shift.square() * (self.count * count / total)
        self.count = total

    @staticmethod
    def _grown(known: Tensor, like: Tensor) -> Tensor:
        return known if known.numel() else torch.zeros_like(like)


@dataclass(frozen=True, eq=False)
class CalibrationStatistics:
    """What consumers read, by parameter and dim; those that read the same values share one ``Moments``."""

    of_consumer: Mapping[Key, Moments]

    def __getitem__(self, consumer: Consumer | Key) -> Moments:
        """Raises ``PlanError`` for a parameter that the data never reached."""
        key = consumer.key if isinstance(consumer, Consumer) else consumer
        found = self.of_consumer.get(key)
        if found is None or not found.count:
            raise PlanError(f"nothing was seen that {key[0]} reads: the calibration data does not reach it")
        return found

    def __contains__(self, consumer: Consumer | Key) -> bool:
        key = consumer.key if isinstance(consumer, Consumer) else consumer
        return key in self.of_consumer and self.of_consumer[key].count > 0


@dataclass(frozen=True)
class ReadStatistics(Statistic[CalibrationStatistics]):
    """One forward pass over the calibration data.

    ``gram``: keep ``X^T X`` too. ``only``: names of the parameters to watch; all consumers when empty.
    """

    gram: bool = False
    only: tuple[str, ...] = ()

    requires = (FindConsumers, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> ReadObserver:
        """What watches the consumers."""
        consumers = analyses.get(FindConsumers())
        return ReadObserver([c for c in consumers if not self.only or c.parameter in self.only], program, self.gram)


class ReadObserver(Observer):
    """Hooks on the modules that own consumers; calls of the operators themselves where no module is in between."""

    def __init__(self, consumers: Consumers | list[Consumer], program: Program, gram: bool = False) -> None:
        self.consumers = list(consumers)
        self.names = {c.parameter: (c.parameter, *program.params[c.parameter].aliases) for c in self.consumers}
        self.gram = gram
        self.moments: dict[Key, Moments] = {}

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        """Consumers with the same sources, seen by modules, are watched once."""
        seen: dict[tuple[frozenset[str], int], Moments] = {}
        loose: list[Consumer] = []
        with ExitStack() as hooks:
            for consumer in self.consumers:
                if consumer.modules is None:
                    self.moments[consumer.key] = Moments()
                    loose.append(consumer)
                    continue
                same = (consumer.sources, consumer.feature)
                if same not in seen:
                    seen[same] = Moments()
                    for path in sorted(consumer.modules):
                        module = calibration.model.get_submodule(path)
                        hook = self._hook(calibration, consumer, seen[same])
                        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                        hooks.callback(handle.remove)
                self.moments[consumer.key] = seen[same]
            if loose:
                hooks.enter_context(self._watch(calibration, loose))
            yield

    def finish(self) -> CalibrationStatistics:
        """What was seen."""
        return CalibrationStatistics(self.moments)

    def _hook(self, calibration: Calibration, consumer: Consumer, moments: Moments) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if calibration.watching:
                given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
                if len(given) != 1 or given[0].shape[consumer.feature] != consumer.features.size:
                    raise PlanError(f"{consumer.parameter} cannot be watched: its module takes several inputs")
                self._add(calibration, moments, given[0].movedim(consumer.feature, -1))

        return look

    def _watch(self, calibration: Calibration, loose: list[Consumer]) -> ProductWatch:
        calibration.whole = True
        tensors = dict(calibration.model.named_parameters(remove_duplicate=False))
        owners = {c.key: next(tensors[n] for n in self.names[c.parameter] if n in tensors) for c in loose}

        def see(key: Key, x: Tensor) -> None:
            if calibration.watching:
                self._add(calibration, self.moments[key], x)

        return ProductWatch(owners, see)

    def _add(self, calibration: Calibration, moments: Moments, x: Tensor) -> None:
        """``x`` with its features last, as sequences of tokens."""
        moments.update(*in_sequences(x, calibration.rows, calibration.masks), gram=self.gram)


def in_sequences(x: Tensor, rows: int, masks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """``x`` as ``(sequences, tokens, features)`` with the mask that fits it, also where tokens were laid end to end.

    Tokens that were put into another order, as experts do, keep no padding apart: there all of them count.
    """
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    for mask in masks:
        tokens = tuple(x.shape[:2]) == tuple(mask.shape) and x.dim() == 3
        if tokens or (x.dim() == 2 and len(flat) == mask.numel()):
            return flat.reshape(*mask.shape, flat.shape[-1]), mask.to(x.device)
    sequences = rows if rows and len(flat) % rows == 0 else len(flat)
    return flat.reshape(sequences, -1, flat.shape[-1]), None
