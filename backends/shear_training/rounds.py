"""One round of fine-tuning: a precomputed order of rows under transformers' Trainer, resumable at its checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shear_ir.errors import PlanError
from shear_training.mixture import Draw
from shear_training.rows import Rows
from shear_training.settings import Recovery

COMPLETE = "complete"
"""A file in a checkpoint folder, written last."""

_LOG_EVERY = 10

PATIENCE = timedelta(days=7)
"""How long processes wait for each other. Torch's own ten minutes (thirty on a CPU) are over before one of them has
cut, checked and repaired a large model; a process that has died is the launcher's to notice, and it does at once."""


class RowOrder(Dataset[tuple[Rows, int]]):
    """The rows of a round in the order in which they are trained on."""

    def __init__(self, sources: Mapping[str, Rows], drawn: Sequence[Draw]) -> None:
        self.sources, self.drawn = sources, drawn

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> tuple[Rows, int]:
        name, row = self.drawn[index]
        return self.sources[name], row


def collate(items: Sequence[tuple[Rows, int]]) -> dict[str, Tensor]:
    """One batch of rows of any sources, as long as the longest of them."""
    parts = (
        [rows.ids[i] for rows, i in items],
        [rows.counted[i] for rows, i in items],
        [rows.lengths[i] for rows, i in items],
    )
    return Rows(*map(torch.stack, parts)).batch(slice(None))


def arguments(settings: Recovery, folder: Path, rows: int = 1) -> TrainingArguments:
    """Trainer's arguments for a round of ``rows`` rows; raises ``PlanError`` where the batch cannot be split."""
    steps = math.ceil(rows / settings.batch)
    # transformers is renaming this option.
    known = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    thrifty: dict[str, Any] = {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}}
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.micro_batch or settings.batch,
        num_train_epochs=1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="steps",
        save_steps=settings.save_steps,
        # The one before the last stays until the last is complete.
        save_total_limit=2,
        logging_steps=_LOG_EVERY,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        bf16=settings.bf16,
        torch_compile=settings.torch_compile,
        use_cpu=on_cpu(settings.device),
        # Said twice: whoever is the first to ask makes the group.
        ddp_timeout=int(PATIENCE.total_seconds()),
        dataloader_pin_memory=not on_cpu(settings.device),
        **(thrifty if settings.gradient_checkpointing else {}),
    )
    # More machines and devices come by accelerate launch, one process each, never by DataParallel.
    made.device  # noqa: B018  # the property finds the devices
    made._n_gpu = min(made._n_gpu, 1)
    return _split(made, settings)


def on_cpu(device: str | None) -> bool:
    """Whether a run on ``device``, a GPU where there is one when None, is on the CPU.

    Raises ``PlanError`` for a GPU that is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError("device: cuda: torch sees no GPU here")
    return device == "cpu" or not torch.cuda.is_available()


def processes(device: str | None) -> PartialState:
    """The processes of a run on ``device``. The first to ask says where they meet, and how long they wait."""
    return PartialState(cpu=on_cpu(device), timeout=PATIENCE)


def _split(made: TrainingArguments, settings: Recovery) -> TrainingArguments:
    processes = made.world_size
    each, rest = divmod(settings.batch, processes)
    micro = settings.micro_batch or each
    if rest or not micro or each % micro:
        raise PlanError(
            f"a batch of {settings.batch} rows cannot be split into steps of {micro or 1} rows on {processes} "
            f"process{'es' * (processes > 1)}"
        )
    made.per_device_train_batch_size, made.gradient_accumulation_steps = micro, each // micro
    return made


def train(
    model: nn.Module, sources: Mapping[str, Rows], drawn: Sequence[Draw], settings: Recovery, folder: Path,
    progress: Callable[[int, int], None] | None = None, *, optimizer: torch.optim.Optimizer | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> int:  # fmt: skip
    """Train what asks for gradients on the rows ``drawn``, in that order; the number of steps.

    ``optimizer``: AdamW when None; its schedule is made here. ``callbacks`` are called before a checkpoint is marked
    as complete.

    The optimizer and its schedule begin anew, so what a round does follows from the weights it starts with and from
    its rows. Goes on from the last complete checkpoint in ``folder``. Raises ``Diverged`` when a loss is no number.
    """
    made = arguments(settings, folder, len(drawn))
    watch = _Watch(progress)
    trainer = Trainer(
        model, made, data_collator=collate, train_dataset=RowOrder(sources, drawn), callbacks=[*callbacks, watch],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=_last_complete(folder, trainer))
    finally:
        # Autocast and compilation are wrapped around forward, anew in each round.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        if made.world_size > 1:
            # DDP must be gone before its process group: gloo waits for ever for a thread that DDP's end holds up.
            trainer.model_wrapped = model
            trainer.accelerator.free_memory()
        if settings.gradient_checkpointing and hasattr(model, "gradient_checkpointing_disable"):
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        model.zero_grad()
    if watch.diverged:
        raise Diverged(trainer.state.global_step)
    return int(trainer.state.global_step)


class Diverged(Exception):
    """The training loss of a round is not a number; ``step``: where that was seen."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the training loss is not a number at step {step}")
        self.step = step


class _Watch(TrainerCallback):
    """Marks complete checkpoints, reports progress, ends a round whose loss is not a number."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self.progress = progress
        self.diverged = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)
        # The loss is logged every few steps, and a short run may be over before.
        trained = (p for p in kwargs["model"].parameters() if p.requires_grad)
        if not all(bool(torch.isfinite(p).all()) for p in trained):
            self.diverged = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not math.isfinite((kwargs.get("logs") or {}).get("loss", 0.0)):
            self.diverged = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def _last_complete(folder: Path, trainer: Trainer) -> str | None:
    """The last checkpoint that was written whole; those that were not are removed by the main process."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    whole = {step: path for step, path in found.items() if (path / COMPLETE).is_file()}
    # Nobody removes what another process has not looked at yet.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for step in found.keys() - whole.keys():
            shutil.rmtree(found[step])
    return str(whole[max(whole)]) if whole else None
