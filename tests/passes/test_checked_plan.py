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


def other_blocks(document: dict[str, Any]) -> None:
    for cut in document["cuts"]:
        cut["group"] = cut["group"].replace("block", "blocks")


def gone_twice(document: dict[str, Any]) -> None:
    document["gone"] *= 2


def gone_elsewhere(document: dict[str, Any]) -> None:
    document["gone"] = ["model.layers.7"]


def without_names(document: dict[str, Any]) -> None:
    del document["names"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (other_blocks, r"cuts blocks \(2 block units\), which in this model does not exist"),
        (gone_twice, "the modules that are gone are not those that its cuts remove"),
        (gone_elsewhere, "the modules that are gone are not those that its cuts remove"),
        (without_names, "its names are not those of the groups that are left"),
    ],
)
@pytest.mark.parametrize("backend", ["module", "graph"])
def test_a_plan_of_blocks_that_contradicts_itself_is_refused(edit: Edit, sentence: str, backend: Any) -> None:
    model = build("llama_gqa")
    document = json.loads(sir.plan(sir.trace(model), blocks=("model.layers.0",)).to_json())
    edit(document)
    with pytest.raises(sir.PlanError, match=sentence):
        sir.shear(model, sir.Plan.from_json(json.dumps(document)), backend=backend)


def test_routers_that_lose_no_experts_are_refused() -> None:
    model = build("llama_gqa")
    document = json.loads(sir.plan(sir.trace(model), blocks=("model.layers.0",)).to_json())
    document["routers"] = {"model.layers.1.mlp.up_proj.weight": 0}
    with pytest.raises(sir.PlanError, match="it cuts no experts of the router model"):
        sir.verify(model, model, sir.Plan.from_json(json.dumps(document)))


@pytest.mark.parametrize("name", ["llama_gqa", "mlp"])
def test_of_each_tensor_just_the_units_stay_that_the_cut_names(name: str) -> None:
    program = sir.trace(build(name))
    groups = sir.groups(program)
    plan = sir.plan(program, ratio=0.2, kinds=("ffn",), importance="random")
    assert plan.cuts
    for cut in plan.cuts:
        for piece in groups.by_name[cut.group].slices:
            assert piece.expression is groups.by_name[cut.group].axis
            assert plan.kept[piece.parameter][piece.dim].tolist() == cut.kept.tolist()
