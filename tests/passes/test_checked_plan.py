"""A plan that somebody edited is believed only when it agrees with itself and the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import shear_ir as sir
from tests.zoo import build

Edit = Callable[[dict[str, Any]], None]


def swap_kept(document: dict[str, Any]) -> None:
    """As many rows stay of one tensor, but others."""
    name = next(n for n in document["kept"] if n.endswith("up_proj.weight"))
    spans = document["kept"][name]["0"]
    count = sum(stop - start for start, stop in spans)
    document["kept"][name]["0"] = [[0, count]] if spans[0][0] != 0 or len(spans) > 1 else [[1, count + 1]]


def forget_one(document: dict[str, Any]) -> None:
    document["kept"].pop(next(iter(document["kept"])))


def cut_twice(document: dict[str, Any]) -> None:
    document["cuts"].append(document["cuts"][0])


def huge(document: dict[str, Any]) -> None:
    next(iter(document["kept"].values()))["0"] = [[0, 100_000_000_000]]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (swap_kept, "contradicts itself"),
        (forget_one, "contradicts itself"),
        (cut_twice, "twice"),
        (huge, "not a plan"),
    ],
)
@pytest.mark.parametrize("backend", ["module", "graph"])
def test_a_plan_that_contradicts_itself_is_refused(edit: Edit, sentence: str, backend: Any) -> None:
    model = build("llama_gqa")
    document = json.loads(sir.plan(sir.trace(model), ratio=0.2).to_json())
    edit(document)
    with pytest.raises(sir.PlanError, match=sentence):
        sir.shear(model, sir.Plan.from_json(json.dumps(document)), backend=backend)
