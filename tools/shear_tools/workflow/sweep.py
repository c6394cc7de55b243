"""Sweep: several ratios, criteria, allocations and repairs of one model, measured alike."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shear_ir.errors import PlanError, ShearError
from shear_ir.plans import Costs
from shear_ir.program import Program
from shear_ir.reading import Unreadable, json_in
from shear_ir.writing import write_text
from shear_passes.importance import criterion
from shear_passes.select import ALLOCATIONS
from shear_tools.api import pipeline, planning
from shear_tools.api.plan_latency import MeasuredScores
from shear_tools.api.repairing import Repairs, named
from shear_tools.workflow.work import alone, digest_of
from shear_training.data import SourceProgress
from shear_training.evaluate import Loss, evaluate_sources
from shear_training.journal import weights_digest
from shear_training.knowledge import Knowledge
from shear_training.rows import Rows

NONE = "none"
"""The repair that does nothing."""


@dataclass(frozen=True)
class Trial:
    """What is asked for: one way to prune."""

    ratio: float
    importance: str
    allocation: str = "uniform"
    repair: str = NONE

    @property
    def label(self) -> str:
        """All but the ratio, as people read it."""
        told = [self.importance, *([self.allocation] if self.allocation != "uniform" else [])]
        return " + ".join([*told, *([self.repair] if self.repair != NONE else [])])


@dataclass(frozen=True)
class Point:
    """What came of a trial. ``losses``: by source; ``why``: what stood in its way, empty where it was measured."""

    trial: Trial
    costs: Costs | None
    losses: Mapping[str, Loss]
    why: str = ""

    @property
    def nll(self) -> float:
        """The mean over the sources, in nats per token."""
        return sum(loss.nll for loss in self.losses.values()) / len(self.losses) if self.losses else math.nan


@dataclass(frozen=True)
class Sweep:
    """``dense``: the model as it is; ``points``: in the order of the trials."""

    dense: Point
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"dense": _told(self.dense), "points": [_told(p) for p in self.points]}


def trials(
    ratios: Sequence[float], importance: Sequence[str], allocations: Sequence[str], repairs: Sequence[str]
) -> list[Trial]:
    """Every combination. Raises ``PlanError`` for a ratio or a name that cannot be."""
    for ratio in ratios:
        if not 0.0 < ratio < 1.0:
            raise PlanError(f"a ratio is a share of the parameters between 0 and 1, not {ratio:g}")
    for name in importance:
        criterion(name)
    for allocation in allocations:
        if allocation not in ALLOCATIONS:
            raise PlanError(f"there is no allocation '{allocation}'; there are {', '.join(ALLOCATIONS)}")
    for repair in repairs:
        if repair != NONE:
            named(repair)
    return [Trial(*each) for each in product(ratios, importance, allocations, repairs)]


def sweep(
    model: nn.Module, wanted: Sequence[Trial], data: Sequence[Any], sources: Mapping[str, Rows], *,
    knowledge: Knowledge | Mapping[str, Mapping[float, float]] | None = None, keep: Path | None = None,
    progress: SourceProgress | None = None, seed: int = 0, batch: int = 8, **options: Any,
) -> Sweep:  # fmt: skip
    """Prune copies of ``model`` by each of ``wanted`` and measure them on ``sources``; ``model`` stays as it is.

    ``data``: calibration batches for criteria and repairs, which one pass each reads; ``options`` are those of
    ``shear_ir.plan``. ``keep``: a file of what is measured, from which the same call goes on. A trial that cannot be
    is noted with the reason; raises ``PlanError`` where that is so for all of them.
    """
    with nullcontext() if keep is None else alone(keep):
        return _swept(model, wanted, data, sources, knowledge, keep, progress, seed, batch, options)


def _swept(
    model: nn.Module, wanted: Sequence[Trial], data: Sequence[Any], sources: Mapping[str, Rows],
    knowledge: Knowledge | Mapping[str, Mapping[float, float]] | None, keep: Path | None,
    progress: SourceProgress | None, seed: int, batch: int, options: Mapping[str, Any],
) -> Sweep:  # fmt: skip
    told: SourceProgress = progress or (lambda what, done, total: None)
    program = pipeline.trace(model)
    if isinstance(knowledge, Knowledge):
        knowledge.require(program.digest)
        knowledge = knowledge.curves
    rows = {n: r.digest for n, r in sources.items()}
    kept = _Kept(keep, digest_of([weights_digest(model), seed, options, knowledge, rows, _digest(data)]))
    bench = _Bench(model, program, data, sources, knowledge, seed, batch, options)
    if kept.dense is None:
        told("measuring the dense model", 0, 1)
        kept.add(Point(Trial(0.0, "dense"), planning.dense_costs(program), bench.measure(model)))
    for number, trial in enumerate(wanted):
        told(f"{trial.label} at {trial.ratio:g}", number, len(wanted))
        if trial not in kept.points:
            kept.add(bench.run(trial))
    points = tuple(kept.points[trial] for trial in wanted)
    if points and all(p.why for p in points):
        raise PlanError(points[0].why)
    assert kept.dense is not None
    return Sweep(kept.dense, points)


def _digest(data: Sequence[Mapping[str, Tensor]]) -> str:
    """A hash of all batches."""
    parts = [(f"{name} {t.shape} ".encode(), t.cpu().numpy().tobytes()) for b in data for name, t in b.items()]
    return hashlib.sha256(b"".join(named + numbers for named, numbers in parts)).hexdigest()


class _Bench:
    """What all trials share: scores by criterion, statistics by repair, each measured when it is first asked for."""

    def __init__(
        self, model: nn.Module, program: Program, data: Sequence[Any], sources: Mapping[str, Rows],
        knowledge: Mapping[str, Mapping[float, float]] | None, seed: int, batch: int, options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.program, self.data, self.sources = model, program, data, sources
        self.knowledge, self.seed, self.batch, self.options = knowledge, seed, batch, options
        self.scored: dict[str, Any] = {}
        self.repairs: dict[str, Repairs] = {}

    def run(self, trial: Trial) -> Point:
        """One trial; what cannot be done is said."""
        try:
            plan = planning.plan(
                self.program, ratio=trial.ratio, importance=self._scores(trial.importance), seed=self.seed,
                allocation=trial.allocation, knowledge=self.knowledge, **self.options,
            )  # fmt: skip
            ready = self.model if trial.repair == NONE else self._repairs(trial.repair)(plan)
            small = pipeline.shear(ready, plan)
        except ShearError as failure:
            return Point(trial, None, {}, str(failure))
        return Point(trial, plan.after, self.measure(small))

    def measure(self, model: nn.Module) -> dict[str, Loss]:
        """The losses on the held-out rows."""
        return evaluate_sources(model, self.sources, batch=self.batch)

    def _scores(self, name: str) -> Any:
        if name not in self.scored:
            self.scored[name] = planning.scores(self.program, name, data=self.data, seed=self.seed)[name]
        return MeasuredScores(name, self.scored[name])

    def _repairs(self, name: str) -> Repairs:
        if name not in self.repairs:
            self.repairs[name] = Repairs(self.model, self.program, [named(name)], self.data)
        return self.repairs[name]


class _Kept:
    """The points that are measured, in a file that is written anew after each of them."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self.path, self.digest = path, digest
        self.dense: Point | None = None
        self.points: dict[Trial, Point] = {}
        if path is not None and path.is_file():
            self._read(path)

    def add(self, point: Point) -> None:
        """Remember a point."""
        if point.trial.ratio:
            self.points[point.trial] = point
        else:
            self.dense = point
        if self.path is not None:
            known = [*([self.dense] if self.dense else []), *self.points.values()]
            write_text(self.path, json.dumps({"run": self.digest, "points": [_told(p) for p in known]}, indent=1))

    def _read(self, path: Path) -> None:
        try:
            read = json_in(path, infinite=True)
            points = [_point(each) for each in read["points"]]
        except (Unreadable, LookupError, TypeError) as failure:
            raise PlanError(f"{path} cannot be read: remove it to begin anew") from failure
        if read.get("run") != self.digest:
            raise PlanError(f"{path} holds a sweep of another model, data or options: remove it to begin anew")
        for point in points:
            if point.trial.ratio:
                self.points[point.trial] = point
            else:
                self.dense = point


def _told(point: Point) -> dict[str, Any]:
    return {
        **asdict(point.trial), "costs": None if point.costs is None else asdict(point.costs), "why": point.why,
        "losses": {name: asdict(loss) for name, loss in point.losses.items()},
    }  # fmt: skip


def _point(read: Mapping[str, Any]) -> Point:
    trial = Trial(read["ratio"], read["importance"], read["allocation"], read["repair"])
    costs = None if read["costs"] is None else Costs(**read["costs"])
    return Point(trial, costs, {name: Loss(**loss) for name, loss in read["losses"].items()}, read["why"])


def ranked(made: Sweep) -> Sweep:
    """The same with the points of each ratio from the lowest loss up."""
    order = sorted(made.points, key=lambda p: (p.trial.ratio, math.isnan(p.nll), p.nll))
    return replace(made, points=tuple(order))
