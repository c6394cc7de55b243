"""A folder from a stranger is data: a record that lies is refused and touches nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shear_ir as sir
from tests.zoo import build

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("gpt2")
    return sir.save(sir.shear(model, sir.plan(sir.trace(model), ratio=0.2)), tmp_path / "out").path


def test_a_model_that_was_cast_is_stock_and_the_cast_that_its_computed_buffers_need_is_said(tmp_path: Path) -> None:
    model = build("llama_gqa").to(torch.bfloat16)
    small = sir.shear(model, sir.plan(sir.trace(model), ratio=0.2))
    saved = sir.save(small, tmp_path / "out")
    assert saved.stock
    assert saved.note.startswith(
        "computed buffers such as inv_freq were cast: from_pretrained(path).to(torch.bfloat16)"
    )
    again = type(model).from_pretrained(tmp_path / "out").to(torch.bfloat16)  # type: ignore[attr-defined]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


def attribute(name: str, value: int) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        next(iter(record["attributes"].values()))[name] = value

    return edit


def gather(record: dict[str, Any]) -> None:
    record["gathers"] = [{"module": "transformer", "argument": 0, "dim": 0, "period": 0, "kept": [0]}]


def fit(record: dict[str, Any]) -> None:
    record["fits"] = [{"module": "transformer", "rank": 2, "places": [2], "old": [8], "new": [6]}]


def wider(record: dict[str, Any]) -> None:
    record["fits"] = [{"module": "transformer", "rank": 2, "places": [1], "old": [8], "new": [9]}]


def config(record: dict[str, Any]) -> None:
    record["config"]["n_embd"] = 96


@pytest.mark.parametrize(
    "edit",
    [
        attribute("__class__", 1),
        attribute("__class__.forward", 7),
        attribute("forward", 1),
        attribute("nf", -5),
        attribute("nf", 10**12),
        gather,
        fit,
        wider,
        config,
        lambda record: record.update(format="shear-ir record 9"),
    ],
)
def test_a_record_that_lies_is_refused(saved: Path, edit: Edit) -> None:
    forward = nn.Linear.forward
    file = saved / "shear_ir.json"
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))
    with pytest.raises(sir.ShearError):
        sir.load(saved)
    assert nn.Linear.forward is forward
