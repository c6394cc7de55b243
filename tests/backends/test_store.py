"""A folder from a stranger is data: a record that lies is refused and touches nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shear_ir as sir
from tests.zoo import build

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("gpt2")
    return sir.save(sir.shear(model, sir.plan(sir.trace(model), ratio=0.2)), tmp_path / "out").path


def attribute(name: str, value: int) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        next(iter(record["attributes"].values()))[name] = value

    return edit


def gather(record: dict[str, Any]) -> None:
    record["gathers"] = [{"module": "transformer", "argument": 0, "dim": 0, "period": 0, "kept": [0]}]


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
