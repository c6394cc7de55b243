"""The measures of the demo, on answers known beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from tools import demo


class Uniform(nn.Module):
    """A language model that knows nothing of 7 tokens."""

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.zeros(*input_ids.shape, 7))


def test_the_perplexity_of_knowing_nothing_is_the_size_of_the_vocabulary() -> None:
    assert demo.perplexity(Uniform(), torch.randint(0, 7, (11, 5))) == pytest.approx(7.0)


def test_rank_correlation_sees_only_the_order() -> None:
    values = np.array([0.3, -1.0, 2.0, 0.9])
    assert demo.spearman(values, np.exp(values)) == pytest.approx(1.0)
    assert demo.spearman(values, -values) == pytest.approx(-1.0)
    # Two neighbours of four trade places: 1 - 6 (1 + 1) / (4 (16 - 1)).
    assert demo.spearman(values, np.array([0.9, -1.0, 2.0, 0.3])) == pytest.approx(0.8)


def test_windows_start_and_end_each_row(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.LANGUAGE_MODEL)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x = 1", "y = 2")))
    rows = demo.windows(tokenizer, file, length=3, most=100)
    flat = rows.flatten().tolist()
    assert rows.shape[1] == 3
    assert flat[0] == tokenizer.bos_token_id
    end = flat.index(tokenizer.eos_token_id)
    assert tokenizer.decode(flat[1:end]) == "x = 1"
    assert flat[end + 1] == tokenizer.bos_token_id


def test_the_sentences_are_all_different() -> None:
    assert len(set(demo.SENTENCES)) == len(demo.SENTENCES) == 40
    assert math.comb(len(demo.SENTENCES), 2) == 780
