"""LHSPG under transformers' Trainer: stopped and resumed, refused where it cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from shear_ir.errors import PlanError
from shear_training.callback import LHSPGCallback
from shear_training.lhspg import LHSPG
from shear_training.schedule import Periods
from tests.training.tiny import adapted, lhspg

PERIODS = Periods(warmup=1, count=2, steps=2)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 60, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Log(TrainerCallback):
    """Keeps the numbers of zero units that are logged."""

    def __init__(self) -> None:
        self.zero: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.zero.append(kwargs["logs"]["zero_units"])


def logged(trainer: Trainer) -> list[int]:
    (log,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Log)]
    return log.zero


class Stop(TrainerCallback):
    """Ends a run after a number of steps, as a kill would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.at


def run(
    folder: Path, stop: int | None = None, resume: bool = False, **options: Any
) -> tuple[peft.PeftModel, LHSPG, Any]:
    model = adapted(targets=("q_proj", "up_proj"))
    optimizer = lhspg(model, {"ffn0": 7, "kv1": 1}, PERIODS)
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=options.pop("max_steps", 7), save_steps=1,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    callbacks: list[TrainerCallback] = [LHSPGCallback(optimizer), Log(), *([Stop(stop)] if stop else [])]
    trainer = Trainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer, trainer


def test_a_run_that_trainer_resumes_ends_bit_identical(tmp_path: Path) -> None:
    whole, optimizer, trainer = run(tmp_path / "whole")
    assert optimizer.zero_units() == 8
    assert logged(trainer) == [0, 0, 4, 4, 8, 8, 8]
    run(tmp_path / "broken", stop=4)
    again, resumed, _ = run(tmp_path / "broken", resume=True)
    assert resumed.zero_units() == 8
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_would_end_before_the_last_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="ends after 4 steps, before the last of 5"):
        run(tmp_path, max_steps=4)


def test_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = lhspg(adapted(targets=("q_proj",)), {"ffn0": 7}, PERIODS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PlanError, match="FSDP shards them"):
        LHSPGCallback(optimizer)


def test_a_checkpoint_without_the_base_tensors_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop=3)
    (tmp_path / "checkpoint-3" / "lhspg_base.safetensors").unlink()
    with pytest.raises(PlanError, match="cannot go on"):
        run(tmp_path, resume=True)
