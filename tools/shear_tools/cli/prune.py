"""``shear-ir prune``: load, trace, analyse, select, shear, verify, save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shear_ir.errors import PlanError, SaveError, ShearError
from shear_tools.cli import console, options, report, scoring
from shear_tools.cli.change import WeightChanges
from shear_tools.cli.models import open_model

if TYPE_CHECKING:
    from shear_ir.frontend.load import LoadedModel
    from shear_ir.plans import Plan
    from shear_ir.program import Program


def prune(
    model: options.ModelArgument,
    ratio: options.RatioOption = None,
    plan: options.PlanOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="The folder to write; there whole or not at all.", show_default=False
        ),
    ] = None,
    force: options.ForceOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan: nothing is removed or saved.")] = False,
    plan_out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the plan to this file.", show_default=False)
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Save without comparing with the masked original.")
    ] = False,
    importance: options.ImportanceOption = None,
    data: options.CalibrationOption = None,
    samples: options.SamplesOption = None,
    device: options.DeviceOption = None,
    repair: options.RepairOption = None,
    rotate: options.RotateOption = None,
    add_biases: options.BiasesOption = False,
    round_to: options.RoundToOption = None,
    allocation: options.AllocationOption = None,
    knowledge: options.KnowledgeOption = None,
    budget: options.BudgetOption = None,
    floor: options.FloorOption = None,
    only: options.OnlyOption = None,
    skip: options.SkipOption = None,
    kinds: options.KindsOption = None,
    blocks: options.BlocksOption = None,
    block_importance: options.BlockImportanceOption = None,
    seed: options.SeedOption = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--keep-adapters", help="Merge the active adapters of a PEFT model, or cut and keep them."
        ),
    ] = False,
    stock: options.StockOption = None,
    backend: options.BackendOption = "module",
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    dtype: options.DtypeOption = None,
    json: options.JsonOption = False,
) -> None:
    """Remove a share of MODEL's parameters and write a smaller model of the same class to OUT.

    --backend graph writes a graph instead, which shear_ir.load reads: for cuts that no class of modules can say.

    A PEFT model keeps its adapters, each in a folder of its own under OUT/adapters, unless they are merged.

    The result is compared with MODEL whose removed units are masked to zero before anything is saved. A folder that
    holds only a config can be planned with --dry-run.
    """
    choices = options.given(
        importance=importance, round_to=options.steps(round_to), allocation=allocation, knowledge=knowledge,
        budget=budget, floor=floor, only=only, skip=skip, kinds=kinds, blocks=blocks,
        block_importance=block_importance, seed=seed, stock=stock,
    )  # fmt: skip
    read = None if data is None else scoring.ReadOptions(data, samples, device)
    change = WeightChanges(
        (repair,) if repair else (), rotate, add_biases, read, trust_remote_code, choices.get("seed", 0)
    )
    asked = _Asked(
        model, ratio, plan, choices, out, force, dry_run, plan_out, not no_verify, merge, backend, read, change, inputs
    )  # fmt: skip
    asked.check()
    if samples is not None and data is None:
        raise PlanError("--samples is a number of rows of --data: give --data FILE")
    if device is not None and data is None:
        raise PlanError("--device is where --data is read: give --data FILE")
    with console.Steps(*asked.steps()) as step:
        result = asked.run(step, trust_remote_code, dtype)
    for sentence in result.warnings:
        console.warn(sentence)
    if json:
        console.put_json(report.as_json(result))
    else:
        report.put(result)


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for; ``choices``: the options of the selection that were given."""

    spec: str
    ratio: float | None
    file: Path | None
    choices: dict[str, Any]
    out: Path | None
    force: bool
    dry_run: bool
    plan_out: Path | None
    verify: bool
    merge: bool
    backend: str
    read: scoring.ReadOptions | None
    change: WeightChanges
    inputs: Path | None

    def check(self) -> None:
        """Refuse what can be refused before the model is loaded."""
        if (self.ratio is None and "blocks" not in self.choices) == (self.file is None):
            raise ShearError("give either --ratio or --plan, which say what goes")
        self.change.check()
        options.require_knowledge(self.choices.get("knowledge"), self.choices.get("allocation", ""))
        if self.file is not None and (self.choices or (self.read and not self.change.reads)):
            names = [*self.choices, *(["data"] if self.read else [])]
            spelled = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ShearError(f"--plan says already what goes: leave out {spelled}")
        if self.ratio is not None and not 0.0 < self.ratio < 1.0:
            raise PlanError(f"--ratio is a share of the parameters between 0 and 1, not {self.ratio:g}")
        from shear_tools.api.pipeline import require_backend

        require_backend(self.backend, self.merge)
        if self.out is None and not self.dry_run:
            raise SaveError("give -o OUT, the folder to write, or --dry-run")
        console.refuse_file(self.plan_out, ".json")
        from shear_backends.store.folder import refuse_existing

        if self.out is not None and not self.dry_run:
            refuse_existing(self.out, self.force)
        if "importance" in self.choices:
            scoring.require_data(self.choices["importance"], self.read, self.choices.get("seed", 0))

    def steps(self) -> list[str]:
        """The names of the steps that ``run`` takes."""
        last = [] if self.dry_run else ["shearing", *(["verifying"] if self.verify else []), "saving"]
        turned = ["rotating"] if self.change.before else []
        mended = ["repairing"] if self.change.repairs and not self.dry_run else []
        return ["loading", *turned, "tracing", "analysing", "selecting", *mended, *last]

    def run(self, step: console.Steps, trust: bool, dtype: options.Dtype | None) -> report.PruneReport:
        """The whole road; nothing is saved that is not sound."""
        from shear_ir.frontend.base import has_adapters
        from shear_ir.plans import Plan
        from shear_tools.api import pipeline

        ready = None if self.file is None else Plan.load(self.file)
        with step("loading"):
            loaded = open_model(self.spec, trust, dtype, self.inputs)
        if loaded.config_only and not self.dry_run:
            raise ShearError(f"{self.spec} has no weights, only a config: it can be planned (--dry-run), not pruned")
        if self.merge and not has_adapters(loaded.model):
            raise ShearError(f"{self.spec} has no adapters to merge")
        if self.backend == "graph" and has_adapters(loaded.model):
            raise ShearError("a graph with adapters is not saved: cut the modules, or merge the adapters first")
        costs: list[str] = []
        if self.change.before:
            with step("rotating"):
                loaded, costs = self.change.turned(loaded, step)
        with step("tracing"):
            program = pipeline.trace(loaded.model) if ready is None else pipeline.planned_program(loaded.model, ready)
        with step("analysing"):
            groups = pipeline.groups(program)
        with step("selecting"):
            plan = self._plan(loaded, program, step, trust) if ready is None else ready
            plan = replace(plan, options={**plan.options, **self.change.told})
        result = report.PruneReport(self.spec, loaded.model, groups, plan, step.seconds, costs)
        if self.dry_run or self.out is None:
            self._write_plan(plan)
            return result
        if self.change.repairs:
            with step("repairing"):
                loaded = self.change.mended(loaded, plan, step)
                result.model = loaded.model
                pipeline.forget(program)  # so that the dense one's memory is free
        with step("shearing"):
            small = pipeline.shear(loaded.model, plan, backend=self.backend, merge=self.merge)
        if self.verify:
            with step("verifying"):
                result.verified = pipeline.verify(loaded.model, small, plan)
            result.verified.raise_if_unsound()
        with step("saving"):
            # First, for OUT is what says that all is done: a run that is killed in between can be run again.
            self._write_plan(plan)
            result.saved = pipeline.save(small, self.out, source=loaded.source, force=self.force)
        return result

    def _write_plan(self, plan: Plan) -> None:
        if self.plan_out is not None:
            console.write_file(self.plan_out, plan.to_json())

    def _plan(self, loaded: LoadedModel, program: Program, step: console.Steps, trust: bool) -> Plan:
        """A new plan; without weights the first units stay."""
        choices = {**({"importance": "order"} if loaded.config_only else {}), **self.choices, "ratio": self.ratio}
        if "blocks" in choices and self.ratio is None:
            choices.pop("importance", None)
        if "knowledge" in choices:
            choices["knowledge"] = _curves(choices["knowledge"], program)
        return scoring.planned(loaded, program, step, self.read, trust, choices)


def _curves(path: Path, program: Program) -> dict[str, dict[float, float]]:
    """What ``shear-ir knowledge`` measured on this model."""
    from shear_training.knowledge import Knowledge

    found = Knowledge.load(path)
    found.require(program.digest)
    return found.curves
