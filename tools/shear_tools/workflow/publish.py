"""The end of a run: the model and what is told about it appear together, and the run's folder goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from shear_backends.store.folder import written_whole
from shear_backends.store.model import Saved
from shear_tools.api import pipeline
from shear_tools.workflow.work import Work


def publish(
    model: nn.Module, work: Work, out: Path, tell: Callable[[Saved, Path], object], *, source: Path | None,
    tokenizer: Any, force: bool, keep_work: bool,
) -> Saved:  # fmt: skip
    """Have the main process write ``model``, and what ``tell`` puts beside it, to ``out``, whole or not at all.

    ``tell`` is called with how the model was saved and the folder in which it lies by then. ``tokenizer`` is written
    where there is no ``source`` to carry one from. The other processes learn where the model is, not how it loads.
    """
    made: list[Saved] = []

    def make() -> None:
        result = work.path("result")
        shutil.rmtree(result, ignore_errors=True)  # what a stop while it was moved has left of it
        saved = pipeline.save(model, result, source=source)
        if source is None:
            tokenizer.save_pretrained(result)
        made.append(Saved(out, saved.stock, saved.note))
        tell(made[0], result)
        with written_whole(out, force) as beside:
            for item in result.iterdir():
                shutil.move(item, beside / item.name)
        if keep_work:
            result.rmdir()
        else:
            shutil.rmtree(work.folder, ignore_errors=True)

    work.once(False, make)
    return made[0] if made else Saved(out, False)
