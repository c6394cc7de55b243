"""Analyses, rewrites and the managers that run them; LLVM's new pass manager is the model.

Passes are frozen dataclasses: their fields are their options, their cache key and their command-line spelling. An
Analysis computes an object from a Program and never changes it; a Rewrite returns a new Program. Results are cached
per Program and dropped by a rewrite that does not preserve them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor

from shear_ir.program import Program
from shear_ir.verifier import verify_program

T = TypeVar("T")

# What needs no quotes inside of name{option=[word,word]}; globs with a [set] are words.
_WORD = re.compile(r'(?:[^\s,"{}\\\[\]]|\[[^\s,"{}\\\[\]]*\])+')


@dataclass(frozen=True)
class Pass:
    """What analyses and rewrites share: a name, the analyses they may ask for."""

    requires: ClassVar[tuple[type[Analysis[Any]], ...]] = ()

    @classmethod
    def name(cls) -> str:
        """The spelling on the command line: ``SelectUniform`` is ``select-uniform``."""
        return re.sub(r"(?<!^)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if f.repr and getattr(self, f.name) != _default(f)
        ]
        return self.name() + ("{" + " ".join(changed) + "}" if changed else "")


class Analysis(Pass, Generic[T]):
    """Computes a result from a Program and leaves the Program alone."""

    @abstractmethod
    def run(self, program: Program, analyses: AnalysisManager) -> T:
        """The result, a returned object and never a note on a node."""


class Rewrite(Pass):
    """Returns a new Program; ``preserves`` lists the analyses whose results hold for it too."""

    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = ()

    @abstractmethod
    def run(self, program: Program, analyses: AnalysisManager) -> Program:
        """The rewritten program; the old one stays as it was."""

    def carry(self, weights: Mapping[str, Tensor] | None, analyses: AnalysisManager) -> Mapping[str, Tensor] | None:
        """The tensors that belong to the rewritten program, given those of the old one."""
        return weights


class AnalysisManager:
    """Runs analyses on one Program, each at most once per set of options."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor] | None = None,
        results: dict[Analysis[Any], Any] | None = None,
    ) -> None:
        self.program = program
        self.weights = weights
        self.timings: list[tuple[str, float]] = []
        self._results: dict[Analysis[Any], Any] = dict(results or {})
        self._asking: list[Pass] = []

    def get(self, analysis: Analysis[T]) -> T:
        """The result of ``analysis``; asking for one that the asking pass does not require is an error."""
        if self._asking and not isinstance(analysis, self._asking[-1].requires):
            raise TypeError(f"{self._asking[-1].name()} asks for {analysis.name()}, which its requires does not list")
        if analysis not in self._results:
            started = time.perf_counter()
            self._results[analysis] = self.running(analysis, lambda: analysis.run(self.program, self))
            self.timings.append((str(analysis), time.perf_counter() - started))
        return cast(T, self._results[analysis])

    def latest(self, kind: type[Analysis[T]]) -> T | None:
        """The result of the analysis of this kind that ran last, whatever its options; None when none ran."""
        if self._asking and not any(issubclass(kind, r) for r in self._asking[-1].requires):
            raise TypeError(f"{self._asking[-1].name()} asks for {kind.name()}, which its requires does not list")
        found = [result for analysis, result in self._results.items() if isinstance(analysis, kind)]
        return cast(T, found[-1]) if found else None

    def put(self, analysis: Analysis[T], result: T) -> None:
        """Hand in a result computed elsewhere, such as scores from data."""
        self._results[analysis] = result

    def fork(self, weights: Mapping[str, Tensor] | None, without: tuple[type[Analysis[Any]], ...]) -> AnalysisManager:
        """A manager of the same program with other weights, sharing every result but those of the kinds ``without``."""
        shared = {a: r for a, r in self._results.items() if not isinstance(a, without)}
        return AnalysisManager(self.program, weights, shared)

    def running(self, asking: Pass, work: Callable[[], T]) -> T:
        """Do ``work`` on behalf of ``asking``, holding it to its ``requires``."""
        self._asking.append(asking)
        try:
            return work()
        finally:
            self._asking.pop()

    def after(self, rewrite: Rewrite, program: Program) -> AnalysisManager:
        """The manager for what ``rewrite`` made: it keeps the results that were preserved."""
        kept = {a: r for a, r in self._results.items() if isinstance(a, rewrite.preserves)}
        manager = AnalysisManager(program, rewrite.carry(self.weights, self), kept)
        manager.timings = self.timings
        return manager


@dataclass
class PipelineResult:
    """What a pipeline ended with: the last program, every analysis result that holds for it, seconds by pass."""

    program: Program
    analyses: AnalysisManager
    timings: list[tuple[str, float]]
    stages: list[tuple[str, Program]] = field(default_factory=list)


@dataclass
class PassManager:
    """Runs passes in order and checks the Program after each rewrite, naming the pass that broke it.

    ``observe`` is called after every pass with the pass and the program it left.
    """

    passes: Sequence[Pass]
    observe: Callable[[Pass, Program, AnalysisManager], None] | None = None

    def run(
        self, program: Program, weights: Mapping[str, Tensor] | None = None,
        given: Mapping[Analysis[Any], Any] | None = None,
    ) -> PipelineResult:  # fmt: skip
        """Run all passes; ``weights`` (tensors by name) feed the criteria that score them.

        ``given``: results from elsewhere, such as ``{Data(): Calibration(model, batches)}``. The result holds the
        final program and what is known about it.
        """
        manager = AnalysisManager(program, weights, dict(given or {}))
        timings: list[tuple[str, float]] = []
        stages = [("start", program)]
        for step in self.passes:
            started = time.perf_counter()
            program, manager = self._run(step, program, manager)
            timings.append((str(step), time.perf_counter() - started))
            stages.append((str(step), program))
            if self.observe is not None:
                self.observe(step, program, manager)
        return PipelineResult(program, manager, timings, stages)

    def _run(self, step: Pass, program: Program, manager: AnalysisManager) -> tuple[Program, AnalysisManager]:
        if isinstance(step, Analysis):
            manager.get(step)
            return program, manager
        if not isinstance(step, Rewrite):
            raise TypeError(f"{step!r} is neither an Analysis nor a Rewrite")
        rewritten = manager.running(step, lambda: step.run(program, manager))
        verify_program(rewritten, blame=str(step))
        return rewritten, manager.after(step, rewritten)

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _spell(value: Any) -> str:
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else json.dumps(value)
    if isinstance(value, Iterable):
        return "[" + ",".join(map(_spell, value)) + "]"
    return str(value)
