"""Recovery of a model that is sheared already: the stages of ``data.yaml`` one after the other, kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from shear_backends.module.shear import RECORD
from shear_backends.store.folder import refuse_existing, tidy
from shear_backends.store.model import Saved
from shear_ir.errors import LoadError, PlanError
from shear_ir.reading import Unreadable, json_in
from shear_ir.writing import write_text
from shear_tools.workflow.publish import publish
from shear_tools.workflow.recipe import Recipe
from shear_tools.workflow.stages import run_stages, stage_settings
from shear_tools.workflow.work import Work, alone, digest_of, place_of
from shear_training.data import DataConfig, SourceProgress, prepare
from shear_training.evaluate import Loss, evaluate_sources, require_readable
from shear_training.journal import weights_digest
from shear_training.rounds import processes
from shear_training.settings import Recovery

RECOVERY_FILE = "recovery.json"
Losses = Mapping[str, Loss]


@dataclass(frozen=True, eq=False)
class Recovered:
    """Where the recovered model lies; ``losses``: of the dense model, of the sheared one and after each stage, on
    every source; ``stages``: their rounds, as ``Recovered.to_json`` tells them."""

    saved: Saved
    losses: Mapping[str, Losses]
    stages: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        losses = {
            name: {source: asdict(loss) | {"perplexity": loss.perplexity} for source, loss in found.items()}
            for name, found in self.losses.items()
        }
        return {
            "out": str(self.saved.path), "stock": self.saved.stock, "note": self.saved.note,
            "losses": losses, "stages": list(self.stages),
        }  # fmt: skip


def recover_stages(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: str | Path, *, data: DataConfig,
    dense: Callable[[], nn.Module] | Mapping[str, float], dense_name: str = "", recipe: Recipe | None = None,
    work: str | Path | None = None, keep_work: bool = False, keep_adapters: bool = False, source: Path | None = None,
    force: bool = False, progress: SourceProgress | None = None,
) -> Recovered:  # fmt: skip
    """Recover the sheared ``model`` in the stages of ``data`` and write it to ``out``, with ``recovery.json`` in it.

    ``dense``: NLL per source of the full model, or what loads it, which is measured once; ``dense_name`` says which one
    it is. ``work``: where the stages keep their state, ``OUT.work`` when None; the same call goes on with what is
    there, and on a CPU ends with the same bits. ``keep_adapters``: those of the last stage are not merged. Raises
    ``PlanError`` for a model that was not sheared, for one with adapters, and for the folder of another run.
    """
    out = Path(out)
    refuse_existing(out, force)
    recipe = recipe or Recipe()
    place = place_of(out, work)
    settings = _settings(model, data, recipe, keep_adapters, place)
    state = processes(recipe.recovery.device)
    sources = prepare(data, tokenizer, progress)
    require_readable(model, sources)
    if not callable(dense):
        _require_losses(dense, sources)
    with alone(place):
        tidy(out)
        refuse_existing(out, force)  # once more: it may have been put back
        kept = Work(place, state, {
            "weights (of another model or plan)": weights_digest(model),
            "dense model": digest_of(dense_name if callable(dense) else dict(dense)),
            "data": digest_of({name: (s.train.digest, s.validation.digest) for name, s in sources.items()}),
            "stages": digest_of([(name, each.digest) for name, each in settings.items()]),
        })  # fmt: skip

        def measured(name: str, load: Callable[[], nn.Module]) -> dict[str, Loss]:
            def make() -> dict[str, Any]:
                options = {"batch": recipe.recovery.eval_batch, "bf16": recipe.recovery.bf16, "state": state}
                found = evaluate_sources(load(), sources, **options, progress=progress)
                return {source: asdict(loss) for source, loss in found.items()}

            return {
                source: Loss(**loss)
                for source, loss in kept.document(f"losses-{name}.json", make, together=True).items()
            }

        sheared = measured("sheared", lambda: model)
        known = measured("dense", dense) if callable(dense) else _given(dense, sheared)
        losses: dict[str, Losses] = {"dense": known, "sheared": sheared}

        def note(number: int, name: str, recovered: nn.Module) -> None:
            losses[name] = measured(f"{number}-{name}", lambda: recovered)

        model, stages = run_stages(model, data, sources, known, settings, kept, note, progress)
        result = Recovered(Saved(out, False), losses, tuple(stages))

        def tell(saved: Saved, folder: Path) -> None:
            told = {**replace(result, saved=saved).to_json(), "out": saved.path.name}
            write_text(folder / RECOVERY_FILE, json.dumps(told, indent=1))

        saved = publish(model, kept, out, tell, source=source, tokenizer=tokenizer, force=force, keep_work=keep_work)
        return replace(result, saved=saved)


def read_losses(path: Path) -> dict[str, float]:
    """NLL per source from a JSON file: ``{source: nll}``, or what ``shear-ir eval --json`` prints."""
    try:
        read = json_in(path)
    except Unreadable as failure:
        raise LoadError(f"the losses {path} cannot be read: {failure}") from failure
    found = read.get("sources", read) if isinstance(read, dict) else None
    entries = found.items() if isinstance(found, dict) else ()
    values: dict[str, Any] = {name: each.get("nll") if isinstance(each, dict) else each for name, each in entries}
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values()):
        raise LoadError(f"{path} must hold the loss of each source, as shear-ir eval --json prints it")
    return {name: float(value) for name, value in values.items()}


def _settings(
    model: nn.Module, data: DataConfig, recipe: Recipe, keep_adapters: bool, place: Path
) -> dict[str, Recovery]:
    """The options of each stage; refuses what no stage could do, before any of them begins."""
    if hasattr(model, "peft_config"):
        raise PlanError("this model has adapters already: merge them before it is recovered")
    if getattr(model, RECORD, None) is None:
        raise PlanError("this model has not been sheared: recover takes what prune or shear_ir.save wrote")
    made = stage_settings(data, recipe, place)
    last = [*made][-1]
    return {name: replace(each, merge=not keep_adapters or name != last) for name, each in made.items()}


def _require_losses(dense: Mapping[str, float], sources: Iterable[str]) -> None:
    missing = [name for name in sources if name not in dense]
    if missing:
        raise PlanError(f"the losses of the dense model lack the source {missing[0]}")


def _given(dense: Mapping[str, float], measured: Losses) -> dict[str, Loss]:
    return {name: Loss(dense[name], loss.tokens) for name, loss in measured.items()}
