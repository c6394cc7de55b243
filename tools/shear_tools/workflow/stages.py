"""The recovery stages of ``data.yaml``, one after the other: their options, and the loop over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shear_ir.errors import PlanError
from shear_tools.workflow.recipe import Recipe
from shear_tools.workflow.work import Work
from shear_training.data import DataConfig, Source, SourceProgress
from shear_training.evaluate import Loss
from shear_training.recovery import recover
from shear_training.rounds import arguments
from shear_training.settings import Recovery

Note = Callable[[int, str, nn.Module], object]
"""Called after a stage with its number, its name and the model it leaves."""


def stage_settings(data: DataConfig, recipe: Recipe, place: Path) -> dict[str, Recovery]:
    """The options of each stage in order; raises ``PlanError`` for what no stage could do."""
    names = [stage.name for stage in data.road]
    unknown = [name for name in recipe.stages if name not in names]
    if unknown:
        raise PlanError(f"the recipe has a stage {unknown[0]}; the stages of the data are {', '.join(names)}")
    made = {name: recipe.stage(name) for name in names}
    for settings in made.values():
        arguments(settings, place)
    return made


def run_stages(
    model: nn.Module, data: DataConfig, sources: Mapping[str, Source], dense: Mapping[str, Loss],
    settings: Mapping[str, Recovery], work: Work, note: Note, progress: SourceProgress | None,
) -> tuple[nn.Module, list[dict[str, Any]]]:  # fmt: skip
    """The recovered model, and what each stage did as ``Recovered.to_json`` tells it.

    ``dense``: losses of the full model on every source; ``settings``: by the stage's name. Each stage keeps its state
    in its own folder of ``work``. Raises what ``recover`` raises.
    """
    told = []
    for number, stage in enumerate(data.road):
        done = recover(
            model, {name: sources[name] for name in stage.sources}, {name: loss.nll for name, loss in dense.items()},
            settings[stage.name], work.path(f"recovery-{number}-{stage.name}"), stage=stage.name, progress=progress,
        )  # fmt: skip
        model = done.model
        told.append(done.to_json())
        note(number, stage.name, model)
    return model, told
