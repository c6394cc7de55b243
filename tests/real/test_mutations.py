"""The check can fail on a real language model, too: one thing wrong in its 30 layers is found, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import shear_ir as sir
from tests.backends.test_verify_mutations import (
    Mutation,
    keep_the_scale_of_another_head_dim,
    move_a_column,
    pair_rotations_wrongly,
    permute_heads,
    swap_kept_indices,
)

pytestmark = [pytest.mark.real, pytest.mark.slow]
IDS = torch.randint(0, 49_152, (2, 9), generator=torch.Generator().manual_seed(0))


def lose_an_entry_of_a_norm(small: nn.Module) -> None:
    """It has no biases; this is its other vector."""
    small.get_parameter("model.layers.29.input_layernorm.weight")[1] = 0.0


MUTATIONS: dict[str, Mutation] = {
    "two kept indices swapped": swap_kept_indices,
    "heads permuted": permute_heads,
    "a wrong rope pair": pair_rotations_wrongly,
    "one column off by 1e-3 of its norm": move_a_column,
    "an entry of a norm lost": lose_an_entry_of_a_norm,
    "the softmax scale of another head_dim": keep_the_scale_of_another_head_dim,
}


@contextmanager
def mutated(small: nn.Module, mutate: Mutation) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in small.named_parameters()}
    scales = {module: module.scaling for module in small.modules() if "scaling" in vars(module)}
    with torch.no_grad():
        mutate(small)
        yield
        for name, tensor in small.named_parameters():
            tensor.copy_(before[name])
    for module, scale in scales.items():
        module.scaling = scale


@pytest.fixture(scope="module", params=["smollm2", "smollm2_bf16"])
def sheared(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    folder: Path = request.getfixturevalue(request.param)
    dense: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    plan = sir.plan(sir.trace(dense), ratio=0.1, importance="random")
    return dense, sir.shear(dense, plan), plan


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_thing_wrong_is_found(sheared: tuple[Any, Any, Any], mutation: str) -> None:
    dense, small, plan = sheared
    with mutated(small, MUTATIONS[mutation]):
        wrong = sir.verify(dense, small, plan, IDS)
    assert not wrong.sound
    assert wrong.gap > 100 * wrong.bound  # in bf16, of which 30 layers make much
    assert wrong.judge == "numbers"
    print(f"{dense.dtype} {mutation}: gap {wrong.gap:.2g}, bound {wrong.bound:.2g}, noise {wrong.noise:.2g}")


def test_nothing_wrong_is_no_alarm(sheared: tuple[Any, Any, Any]) -> None:
    dense, small, plan = sheared
    report = sir.verify(dense, small, plan, IDS)
    assert report.sound
    assert report.judge == "structure"


def test_an_eps_that_does_not_follow_a_narrower_stream_is_found(smollm2: Path) -> None:
    dense: Any = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    plan = sir.plan(sir.trace(dense), ratio=0.1, kinds=["residual"], importance="random")
    small = sir.shear(dense, plan)
    assert sir.verify(dense, small, plan, IDS).sound
    norm: Any = small.get_submodule("model.layers.1.input_layernorm")
    assert norm.variance_epsilon != dense.config.rms_norm_eps
    norm.variance_epsilon = dense.config.rms_norm_eps
    assert not sir.verify(dense, small, plan, IDS).sound
