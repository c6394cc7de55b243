"""What ``shear-ir opt`` does after each pass: print, check, compare, draw."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shear_backends.draw import draw
from shear_backends.graph.module import graph_module
from shear_backends.module.judge import rounding
from shear_backends.verify.numbers import difference, evaluation, run
from shear_backends.verify.sides import Side
from shear_ir.errors import UnsoundError
from shear_ir.frontend.feeds import inputs_of
from shear_ir.manager import AnalysisManager, Pass, Rewrite
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_ir.verifier import verify_program
from shear_passes.analysis.dump import Dump
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.rewrite.cuts import Selection
from shear_passes.rewrite.shear import Shear
from shear_tools.cli import console


@dataclass
class Watch:
    """An observer for ``PassManager``; ``steps`` says of each pass what it left."""

    model: nn.Module
    printing: bool = False
    verifying: bool = False
    comparing: bool = False
    draw_after: str | None = None
    picture: Path | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    _before: AnalysisManager | None = None
    _applied: Plan | None = None

    def start(self, program: Program) -> None:
        """Print the program that the first pass gets."""
        if self.printing:
            console.put_lines("# start", AnalysisManager(program).get(Dump()), "")

    def __call__(self, step: Pass, program: Program, analyses: AnalysisManager) -> None:
        """What ``PassManager`` calls after each pass."""
        done: dict[str, Any] = {
            "pass": str(step), "operators": sum(1 for _ in program.calls()), "parameters": program.parameter_count
        }  # fmt: skip
        if self.printing:
            text = analyses.get(Dump()) if isinstance(step, Rewrite) else "unchanged"
            console.put_lines(f"# after {step}", text, "")
        if self.verifying:
            verify_program(program, blame=str(step))
        if isinstance(step, Shear):
            self._note(step)
        if self.comparing and isinstance(step, Rewrite):
            done["max_abs_diff"] = self._compare(step, program, analyses)
        if self.picture is not None and step.name() == self.draw_after:
            plan = None if isinstance(step, Rewrite) else analyses.latest(Selection)  # type: ignore[type-abstract]
            draw(program, analyses.get(FindGroups()), self.picture, plan=plan)
        self.steps.append(done)
        self._before = analyses

    def _note(self, step: Shear) -> None:
        """Join what ``step`` has cut to what was cut before."""
        plan = Plan.load(step.plan) if step.plan else None
        if plan is None and self._before is not None:
            plan = self._before.latest(Selection)  # type: ignore[type-abstract]
        if plan is not None:
            self._applied = plan if self._applied is None else self._applied.then(plan)

    def _compare(self, step: Pass, program: Program, analyses: AnalysisManager) -> float:
        """The largest difference to the original model, masked by the cuts so far; raises ``UnsoundError``."""
        feed = inputs_of(self.model)
        reference = Side.of(self.model) if self._applied is None else Side.masked(self.model, self._applied)
        graph = Side.of(graph_module(program, analyses.weights or {}))
        # Whatever the model's own code prints is no result.
        with evaluation(self.model), redirect_stdout(sys.stderr):
            expected, found = (side.ask(run, feed, torch.float64) for side in (reference, graph))
        gap = difference(expected, found)
        scale = max([0.0, *(float(t.abs().max()) for t in expected if t.numel())])
        if not gap <= rounding(program) * scale:
            raise UnsoundError(
                f"after {step} the program's outputs differ from the masked original's by {gap:.3g} "
                f"(outputs up to {scale:.3g})"
            )
        return gap
