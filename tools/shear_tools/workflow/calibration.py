"""Batches of text to judge units by, from what a user calls data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shear_training.data import SourceProgress, held_out, load_data, prepare
from shear_training.rows import Rows

SAMPLES = 128
BATCH = 8


def calibration_batches(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = SAMPLES,
    batch: int = BATCH,
    seed: int = 0,
    progress: SourceProgress | None = None,
) -> tuple[list[dict[str, Tensor]], dict[str, Rows]]:
    """``samples`` rows in batches, from all sources alike, drawn by ``seed``; and the rows by source.

    Of a data.yaml these are rows to train on, so that what is measured later was not looked at; of one file, its rows.
    Batches hold rows of one source. Raises ``LoadError``.
    """
    sources = rows_to_judge_by(data, tokenizer, progress)
    return batches_of(sources, samples, batch, seed), sources


def rows_to_judge_by(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, progress: SourceProgress | None = None
) -> dict[str, Rows]:
    """Of a data.yaml the rows to train on, by source; of one file, its rows. Raises ``LoadError``."""
    config = load_data(data, whole=True)
    if Path(data).suffix.lower() in (".yaml", ".yml"):
        return {name: source.train for name, source in prepare(config, tokenizer, progress).items()}
    return held_out(config, tokenizer, progress)


def batches_of(
    sources: Mapping[str, Rows], samples: int = SAMPLES, batch: int = BATCH, seed: int = 0
) -> list[dict[str, Tensor]]:
    """``samples`` rows in batches, from all ``sources`` alike, drawn by ``seed``; a batch holds rows of one source."""
    draw = torch.Generator().manual_seed(seed)
    made: list[dict[str, Tensor]] = []
    left = samples
    # The smallest first, so that what it lacks comes from the others.
    for place, (_, rows) in enumerate(sorted(sources.items(), key=lambda item: len(item[1]))):
        count = min(len(rows), max(1, left // (len(sources) - place))) if left else 0
        left -= count
        picked = torch.randperm(len(rows), generator=draw)[:count].sort().values.tolist()
        made += [rows.batch(picked[start : start + batch]) for start in range(0, count, batch)]
    return made
