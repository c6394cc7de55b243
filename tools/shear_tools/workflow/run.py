"""The whole road of LoRAShear as one call; each stage reads what an earlier run of it left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shear_backends.module.adapted import merged
from shear_backends.module.shear import RECORD
from shear_backends.store.folder import refuse_existing, tidy
from shear_backends.store.model import Saved
from shear_ir.errors import PlanError
from shear_ir.frontend.adapters import find_adapters
from shear_ir.frontend.base import has_adapters, plain_base
from shear_ir.plans import Plan
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.importance import Scores
from shear_passes.rewrite.cuts import build_plan
from shear_passes.select.choose import DEFAULT_KINDS
from shear_tools.api import pipeline, planning
from shear_tools.api.repairing import repair
from shear_tools.workflow.calibration import batches_of
from shear_tools.workflow.measure import compare_speed, sample
from shear_tools.workflow.publish import publish
from shear_tools.workflow.recipe import Recipe
from shear_tools.workflow.report import write_report
from shear_tools.workflow.stages import run_stages, stage_settings
from shear_tools.workflow.work import Work, alone, digest_of, place_of
from shear_training.data import DataConfig, Source, SourceProgress, load_data, prepare
from shear_training.evaluate import Loss, evaluate, evaluate_sources, require_numbers, require_readable
from shear_training.journal import weights_digest
from shear_training.knowledge import Knowledge, candidates, frozen_count, measure_knowledge
from shear_training.lora import require_rank
from shear_training.pruning import prune
from shear_training.rounds import arguments, processes
from shear_training.saliency import measured_names

SAMPLE_TOKENS = 24
"""Tokens of held-out text that a sample of the models' own text goes on from."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where the smaller model lies, and the report beside it as JSON types."""

    saved: Saved
    plan: Plan
    report: Mapping[str, Any]


@dataclass(frozen=True)
class PruneOptions:
    """What goes: the options of ``shear_ir.plan`` that a run has."""

    ratio: float
    round_to: int | Mapping[str, int] = 1
    kinds: tuple[str, ...] = DEFAULT_KINDS
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def lorashear(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: str | Path, *, ratio: float, data: str | Path,
    recipe: Recipe | None = None, work: str | Path | None = None, keep_work: bool = False,
    source: Path | None = None, force: bool = False, round_to: int | Mapping[str, int] = 1,
    kinds: tuple[str, ...] = DEFAULT_KINDS, only: tuple[str, ...] = (), skip: tuple[str, ...] = (), command: str = "",
    progress: SourceProgress | None = None,
) -> Outcome:  # fmt: skip
    """Prune ``model`` by ``ratio`` of its parameters while it trains, recover it, write it and a report to ``out``.

    ``model``: a causal language model, plain or with LoRA adapters; its weights change. ``data``: a ``data.yaml``.
    ``work``: the folder of the stages' artefacts, beside ``out`` when None; the same call goes on with what is there,
    and on a CPU ends with the same bits; it is removed at the end unless ``keep_work``. Raises the stages' errors.
    """
    out = Path(out)
    refuse_existing(out, force)
    choice = PruneOptions(ratio, round_to, tuple(kinds), tuple(only), tuple(skip))
    place = place_of(out, work)
    run = _Run(model, tokenizer, load_data(data), choice, recipe or Recipe(), place, keep_work, progress)
    with alone(place):
        tidy(out)
        refuse_existing(out, force)  # once more: it may have been put back
        return run.go(out, source, force, command)


@dataclass(eq=False)
class _Run:
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    choice: PruneOptions
    recipe: Recipe
    place: Path
    keep_work: bool
    progress: SourceProgress | None
    losses: dict[str, dict[str, Loss]] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)

    def go(self, out: Path, source: Path | None, force: bool, command: str) -> Outcome:
        self._check()
        self.sources = prepare(self.data, self.tokenizer, self.progress)
        _to_device(self.model, self.state.device)
        require_readable(self.model, self.sources)
        data = {name: (s.train.digest, s.validation.digest) for name, s in self.sources.items()}
        self.work = Work(self.place, self.state, {
            "weights (of another model)": weights_digest(self.model),
            "options": digest_of([asdict(self.choice), asdict(self.recipe.knowledge), self.recipe.pruning.digest]),
            "data": digest_of([data, self.data.model_dump(mode="json", include={"stages"})]),
        })  # fmt: skip
        self._note("dense", self.model)
        scores = self._scores()  # first, for a criterion may not be able to
        knowledge = self._knowledge()
        small, plan, pruned = self._pruned(knowledge, scores)
        self._note("pruned", small)
        small, stages = run_stages(
            small, self.data, self.sources, self.losses["dense"], self.settings, self.work,
            lambda _, name, model: self._note(name, model), self.progress,
        )  # fmt: skip
        report = {
            "command": command, "choice": asdict(self.choice), "recipe": self.recipe.to_json(),
            "data": self.data.model_dump(mode="json"), "plan": plan, "knowledge": knowledge, "pruning": pruned,
            "losses": self.losses, "samples": self.samples, "stages": stages,
        }  # fmt: skip
        return self._save(small, plan, report, out, source, force)

    def _check(self) -> None:
        """Refuse what no stage could do, before any of them begins."""
        self.state = processes(self.recipe.pruning.device)
        self.settings = stage_settings(self.data, self.recipe, self.place)
        arguments(self.recipe.pruning.training(), self.place)
        # Adapters of the user's own are pruned with as they are; what is left at the end has none, and is what counts.
        self.plain = plain_base(self.model) if has_adapters(self.model) else self.model
        if self.plain is self.model:
            require_rank(self.model, self.recipe.pruning.rank, "pruning.rank")
        elif not any(adapter.active for adapter in find_adapters(self.model)):
            raise PlanError("the adapters of the model are switched off: switch one on, or give the model without them")
        for name, each in self.settings.items():
            require_rank(self.model, each.rank, f"the rank of the stage {name}")
        self.groups = pipeline.groups(pipeline.trace(self.model))
        self.counted = self.groups.program if self.plain is self.model else pipeline.trace(self.plain)
        self._target(())
        names = [group.name for group in candidates(self.groups, self.choice.kinds)]
        if frozen_count(self.recipe.knowledge.freeze, len(names)) == len(names):
            self._target(tuple(names))

    def _note(self, name: str, model: nn.Module) -> None:
        """Measure a model on every source, and let it write; once, for the numbers are kept."""

        def make() -> dict[str, Any]:
            found = evaluate_sources(model, self.sources, **self._measuring(), progress=self.progress)
            require_numbers(found, name)
            written = self._sample(model) if self.state.is_main_process else ""
            return {"losses": {n: asdict(loss) for n, loss in found.items()}, "sample": written}

        read = self.work.document(f"losses-{name}.json", make, together=True)
        self.losses[name] = {n: Loss(**loss) for n, loss in read["losses"].items()}
        self.samples[name] = read["sample"]

    def _measuring(self) -> dict[str, Any]:
        return {"batch": self.recipe.recovery.eval_batch, "bf16": self.recipe.recovery.bf16, "state": self.state}

    def _sample(self, model: nn.Module) -> str:
        rows = next(iter(self.sources.values())).validation
        prompt = rows.ids[0, : min(SAMPLE_TOKENS, int(rows.lengths[0]))].tolist()
        begun = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
        return f"{begun}⟶{sample(model, self.tokenizer, prompt)}"

    def _knowledge(self) -> Knowledge:
        asked = self.recipe.knowledge
        path, partial = self.work.path("knowledge.json"), self.work.path("knowledge.partial.json")

        def make() -> None:
            told = self.progress
            made = measure_knowledge(
                self.model, self.groups, self._loss, kinds=self.choice.kinds, ratios=asked.ratios, share=asked.freeze,
                progress=None if told is None else lambda done, total: told("measuring knowledge", done, total),
                resume=partial, keeps=self.state.is_main_process,
            )  # fmt: skip
            if self.state.is_main_process:
                made.save(path)
                partial.unlink(missing_ok=True)

        self.work.together(path.is_file(), make)
        return Knowledge.load(path)

    def _loss(self, model: nn.Module, **change: Any) -> float:
        """The mean NLL of the sources on the rows that knowledge is measured on."""
        count = self.recipe.knowledge.rows
        options = self._measuring() | change
        found = [evaluate(model, s.train.spread(count), **options) for s in self.sources.values()]
        return sum(each.nll for each in found) / len(found)

    def _target(self, frozen: tuple[str, ...], knowledge: Knowledge | None = None) -> Plan:
        """How many units of each group go; training decides which. Without frozen groups the choice is possible."""
        chosen = self.choice
        measured = self.recipe.allocation == "by-knowledge"
        try:
            return planning.plan(
                self.counted, ratio=chosen.ratio, round_to=chosen.round_to, kinds=chosen.kinds,
                only=chosen.only, skip=chosen.skip, frozen=frozen, importance="magnitude",
                # Before anything is measured it can be seen all the same whether the ratio is within reach.
                allocation="uniform" if measured and knowledge is None else self.recipe.allocation,
                knowledge=None if knowledge is None else knowledge.curves,
            )  # fmt: skip
        except PlanError as failure:
            if not frozen:
                raise
            raise PlanError(
                f"knowledge.freeze {self.recipe.knowledge.freeze:g} leaves {len(frozen)} groups whole, and then "
                f"{failure}: lower knowledge.freeze (0 is --stock), or the ratio"
            ) from failure

    def _pruned(self, knowledge: Knowledge, scores: Mapping[str, Scores]) -> tuple[nn.Module, Plan, dict[str, Any]]:
        """The sheared model as it was saved: a run that is gone on with is no other than one that was not stopped."""
        folder = self.work.path("pruned")
        dense = self.model
        if not folder.is_dir():
            target = self._target(knowledge.frozen, knowledge)
            # What cannot be sheared is to be known before hours of training, not after them.
            pipeline.shear(self.model, target)
            before = self._before()
            made = prune(
                self.model, self.groups, target, self._first(), self.recipe.pruning, self.work.path("lhspg"),
                self._told("pruning"), scores,
            )  # fmt: skip
            dense = made.model
            told = {"steps": made.steps, "tokens": made.tokens}
            self.work.once(False, lambda: self._shear(before, dense, made.kept, told))
        # What was sheared before is made again of its own dense class, which the folder names.
        small = pipeline.load(folder, None if _is_sheared(dense) else dense)
        _to_device(small, self.state.device)
        return small, Plan.load(self.work.path("cut.json")), self.work.document("pruning.json", dict)

    def _first(self) -> dict[str, Source]:
        """What is trained on while units go: the sources of the first stage."""
        return {name: self.sources[name] for name in self.data.road[0].sources}

    def _calibration(self) -> list[dict[str, Tensor]]:
        """Rows to judge units by and to repair on: rows to train on, for what is measured was not looked at."""
        rows = {name: source.train for name, source in self._first().items()}
        return batches_of(rows, self.recipe.pruning.calibration, seed=self.recipe.pruning.seed)

    def _scores(self) -> dict[str, Scores]:
        """Of the criteria that are measured before the training, unless that is over."""
        names = measured_names(self.recipe.pruning.criteria)
        if not names or self.work.path("pruned").is_dir():
            return {}
        told = self._told("judging units")
        found = planning.scores(
            self.groups.program, *names, data=self._calibration(), seed=self.recipe.pruning.seed,
            progress=None if told is None else lambda done, total: told(done, total or 0),
        )  # fmt: skip
        asked = candidates(self.groups, self.choice.kinds)
        # Whether a criterion has scores for a group is seen when they are read.
        return {name: {group: scores[group] for group in asked} for name, scores in found.items()}

    def _before(self) -> nn.Module | None:
        """The model as it is before the training, its adapters merged, where it is to be repaired."""
        if self.recipe.pruning.repair == "none":
            return None
        copied = copy.deepcopy(self.model)
        _to_device(copied, "cpu")
        return merged(copied) if has_adapters(copied) else copied

    def _shear(
        self, before: nn.Module | None, dense: nn.Module, kept: Mapping[str, Any], pruned: dict[str, Any]
    ) -> None:
        device = next(dense.parameters()).device
        # The comparison holds three models in float32, for which the host has more room.
        _to_device(dense, "cpu")
        program = pipeline.trace(dense)
        groups = pipeline.groups(program)
        plan = build_plan(
            groups, pipeline.analyses(program).get(MeasureCosts()), {groups.by_name[n]: k for n, k in kept.items()},
            options={**asdict(self.choice), "frozen": []}, reason="zero at the end of LHSPG",
        )  # fmt: skip
        small = pipeline.shear(dense, plan)
        pipeline.verify(dense, small, plan).raise_if_unsound()
        if before is not None:
            small, pruned["repair"] = self._better(small, before, plan, device)
        for model in (dense, small):
            _to_device(model, device)
        rows = next(iter(self.sources.values())).validation
        ids = rows.ids[: min(4, len(rows)), : int(rows.lengths[:4].min())].long()
        speeds = compare_speed([dense, small], ids)
        document = {**pruned, "speed": {"dense": asdict(speeds[0]), "sheared": asdict(speeds[1])}}
        self.work.write("pruning.json", document)
        plan.save(self.work.path("cut.json"))  # that of this run alone: the folder's has earlier ones in it
        pipeline.save(small, self.work.path("pruned"), force=True)

    def _better(
        self, trained: nn.Module, before: nn.Module, plan: Plan, device: torch.device
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Of the trained model and the repaired one, both with the units of ``plan``, that with the lower loss."""
        _to_device(before, device)
        ready = repair(before, plan, self.recipe.pruning.repair, data=self._calibration())
        for model in (before, ready):
            _to_device(model, "cpu")
        repaired = pipeline.shear(ready, plan)
        pipeline.verify(ready, repaired, plan).raise_if_unsound()
        losses = {}
        for name, model in (("trained", trained), ("repaired", repaired)):
            _to_device(model, device)
            losses[name] = self._loss(model, state=None)  # this process is alone here
            _to_device(model, "cpu")
        taken = "repaired" if losses["repaired"] < losses["trained"] else "trained"
        told = {"name": self.recipe.pruning.repair, **losses, "taken": taken}
        return (repaired if taken == "repaired" else trained), told

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)

    def _save(
        self, small: nn.Module, plan: Plan, report: dict[str, Any], out: Path, source: Path | None, force: bool
    ) -> Outcome:
        def tell(saved: Saved, folder: Path) -> None:
            report["stock"], report["note"] = saved.stock, saved.note
            report["document"] = write_report(report, folder)

        done = publish(
            small, self.work, out, tell, source=source, tokenizer=self.tokenizer, force=force, keep_work=self.keep_work
        )
        return Outcome(done, plan, report.get("document", {}))


def _is_sheared(model: nn.Module) -> bool:
    return any(RECORD in vars(module) for module in model.modules())


def _to_device(model: nn.Module, device: torch.device | str) -> None:
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        model.to(device)
