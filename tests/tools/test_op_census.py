"""The census of operators counts them, tells where their rules come from, and names what barriers freeze."""

from __future__ import annotations

import io
import json

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import op_census
from tests.golden import expect


@torch.library.custom_op("census::inverse", mutates_args=())
def inverse(matrix: Tensor) -> Tensor:
    """An operator of somebody else, which therefore never has a rule."""
    return torch.linalg.inv(matrix)


@inverse.register_fake
def _(matrix: Tensor) -> Tensor:
    return torch.empty_like(matrix)


class Inverted(nn.Module):
    """A linear map, an operator that nothing is known of, and another linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)
        self.square = nn.Parameter(torch.eye(10))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x) @ inverse(self.square)
        return self.down(torch.tanh(inner) * torch.tanh(inner))


def test_operators_are_counted_with_the_origin_of_their_rules() -> None:
    found = op_census.census(Inverted())
    assert [(op.name, op.calls, op.rule) for op in found.operators] == [
        ("aten.linear", 2, "table"),
        ("aten.tanh", 2, "pointwise"),
        ("aten.matmul", 1, "table"),
        ("aten.mul.Tensor", 1, "pointwise"),
        ("census.inverse", 1, "none"),
    ]


def test_a_barrier_names_the_groups_it_freezes() -> None:
    text = io.StringIO()
    op_census.report(op_census.census(Inverted()), Console(width=110, file=text))
    expect(
        text.getvalue().partition("barriers")[2].partition("\n")[2],
        """
        ┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
        ┃ barrier                         ┃ in modules ┃ freezes                        ┃
        ┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
        │ no axis rule for census.inverse │ the root   │ a0 (other): square             │
        │                                 │            │ a1 (other): square             │
        │                                 │            │ a2 (other): up.weight, up.bias │
        │                                 │            │ a5 (other): down.weight        │
        └─────────────────────────────────┴────────────┴────────────────────────────────┘
        """,
    )


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    op_census.main("tests.tools.test_op_census:Inverted", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["operators"][-1] == {"name": "census.inverse", "calls": 1, "rule": "none"}
    (barrier,) = found["barriers"]
    assert barrier["reason"] == "no axis rule for census.inverse"
    assert [held["parameters"] for held in barrier["held"]] == [
        ["square"],
        ["square"],
        ["up.weight", "up.bias"],
        ["down.weight"],
    ]


def test_an_architecture_by_name_is_its_default_config_without_weights() -> None:
    model = op_census.named("llama")
    assert isinstance(model, LlamaForCausalLM)
    assert model.device.type == "meta"


def test_a_model_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stop:
        op_census.main("tests.zoo:nothing")
    assert stop.value.exit_code == 2
    assert capsys.readouterr().err.count("\n") == 1
