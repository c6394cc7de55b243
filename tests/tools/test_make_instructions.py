"""The bundled instructions: made of the bundled texts, nothing held out among those that are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import make_instructions as tool
from shear_training.data import load_data, prepare


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("half", ["train", "heldout"])
def test_the_bundled_file_is_what_the_tool_makes(half: str) -> None:
    made = tool.rows(tool.FOLDER / half)
    assert made == read(tool.FOLDER / half / "instructions.jsonl")
    assert {row["instruction"].split()[0] for row in made} == {"Continue", "Explain", "Write"}
    assert all(tool.SHORT <= len(row["output"]) <= tool.LONG + 2 for row in made)
    assert (tool.FOLDER / half / "instructions.jsonl").stat().st_size <= tool.BYTES


def test_no_text_of_a_held_out_row_is_trained_on() -> None:
    held = [row["text"] for name in tool.MAKERS for row in read(tool.FOLDER / "heldout" / f"{name}.jsonl")]
    paragraphs = {part.strip() for text in held for part in text.split("\n\n") if len(part.strip()) >= 120}
    assert len(paragraphs) > 100
    for row in read(tool.FOLDER / "train" / "instructions.jsonl"):
        assert not paragraphs & {part.strip() for part in row["output"].split("\n\n")}


def test_a_docstring_a_topic_and_a_function_become_rows() -> None:
    long = "word " * 20
    doc = {"text": f"Say it.\n\n{long}\n\nmore", "source": "a.py"}
    topic = {"text": f'The "x" thing\n***\n\n{long}', "source": "topics.py#x"}
    code = {"text": f"def f(x):\n    y = '{long}'\n    return y\n", "source": "b.py"}
    assert [row["input"] for row in tool.docstrings([doc])] == ["Say it."]
    assert [row["output"] for row in tool.docstrings([doc])] == [f"{long}\n\nmore"]
    assert [row["instruction"] for row in tool.topics([topic, topic])] == [
        "Explain this topic of the Python language: The 'x' thing."
    ]
    assert [(row["input"], row["output"]) for row in tool.functions([code, {"text": "def (", "source": "c"}])] == [
        ("def f(x):", f"    y = '{long}'\n    return y")
    ]


def test_the_bundled_data_has_two_stages_and_rows_for_each() -> None:
    config = load_data(tool.FOLDER / "data.yaml")
    made = prepare(config, AutoTokenizer.from_pretrained(tool.FOLDER))
    assert [stage.name for stage in config.road] == ["pretraining", "instructions"]
    assert {name: len(source.validation) for name, source in made.items()} == dict.fromkeys(made, config.validation)
    assert all(len(source.train) > 400 for source in made.values())
    # Of an instruction, the answer alone counts.
    rows = made["instructions"].train
    assert 0.4 < float(rows.counted.sum() / rows.lengths.sum()) < 0.9
