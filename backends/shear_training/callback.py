"""LHSPG under transformers' Trainer: the base weights go into its checkpoints, and nothing ends too early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shear_ir.errors import PlanError
from shear_ir.reading import Unreadable, require_regular
from shear_training.lhspg import LHSPG

BASE_FILE = "lhspg_base.safetensors"


class LHSPGCallback(TrainerCallback):
    """``Trainer(model, args, optimizers=(lhspg, None), callbacks=[LHSPGCallback(lhspg)])``.

    Refuses runs that end before the last unit is zero, and FSDP; saves the base tensors beside each checkpoint and
    reads them when a run goes on. Raises ``PlanError``.
    """

    def __init__(self, optimizer: LHSPG) -> None:
        self.lhspg = optimizer
        _refuse_shards(parse_flag_from_env("ACCELERATE_USE_FSDP"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run against the schedule; when it goes on from a checkpoint, read the base tensors."""
        _refuse_shards(bool(args.fsdp))
        total = self.lhspg.periods.total
        if state.max_steps < total:
            raise PlanError(
                f"the run ends after {state.max_steps} steps, before the last of {total} pruning steps: set max_steps "
                f"to {total} or more, or make the periods shorter"
            )
        if state.global_step:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self._read(folder, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the base tensors into the checkpoint that Trainer has just written."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            beside = folder / f".{BASE_FILE}"
            save_file({n: t.detach().contiguous().cpu() for n, t in self.lhspg.base_tensors().items()}, beside)
            beside.rename(folder / BASE_FILE)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log how many units are on their way and how many are zero."""
        logs = kwargs.get("logs")
        if logs is not None and self.lhspg.units is not None:
            logs["redundant_units"] = int(self.lhspg.redundant.sum())
            logs["zero_units"] = self.lhspg.zero_units()

    def _read(self, folder: Path, step: int) -> None:
        if not (folder / BASE_FILE).is_file():
            raise PlanError(f"{folder} holds no {BASE_FILE}: it was not written with this callback, so it cannot go on")
        if self.lhspg.step_count != step:
            raise PlanError(f"{folder} holds the optimizer of step {self.lhspg.step_count}, not of {step}")
        try:
            require_regular(folder / BASE_FILE)
            tensors = load_file(folder / BASE_FILE)
        except (OSError, SafetensorError, Unreadable) as failure:
            raise PlanError(f"{folder / BASE_FILE} cannot be read: {failure}") from failure
        into = self.lhspg.base_tensors()
        if any(name not in tensors or tensors[name].shape != tensor.shape for name, tensor in into.items()):
            raise PlanError(f"{folder / BASE_FILE} holds tensors of another model")
        with torch.no_grad():
            for name, tensor in into.items():
                tensor.copy_(tensors[name])


def _refuse_shards(fsdp: bool) -> None:
    if fsdp:
        raise PlanError("LHSPG needs whole tensors, and FSDP shards them: use DDP or one process")
