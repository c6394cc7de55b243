"""The check can fail: whatever is wrong by more than rounding is found, and what is right never is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_ir.plans import Plan
from tests.roads import Traced, trace
from tests.zoo import build

pytestmark = pytest.mark.lengths

Mutation = Callable[[nn.Module], None]
"""Makes one thing wrong in a sheared model."""


def swap_kept_indices(small: nn.Module) -> None:
    weight = small.get_parameter("model.layers.1.mlp.down_proj.weight")
    weight[:, [2, 3]] = weight[:, [3, 2]]


def permute_heads(small: nn.Module) -> None:
    weight, size = small.get_parameter("model.layers.0.self_attn.q_proj.weight"), _head_dim(small)
    weight[:] = torch.cat([weight[size : 2 * size], weight[:size], weight[2 * size :]])


def pair_rotations_wrongly(small: nn.Module) -> None:
    """Without positions it would be the same function: query and key lose the same pairs, but not the same angles."""
    for name in ("q_proj", "k_proj"):
        weight, size = small.get_parameter(f"model.layers.0.self_attn.{name}.weight"), _head_dim(small)
        by_head = weight.view(-1, size, weight.shape[1])
        by_head[:, [0, 1]] = by_head[:, [1, 0]]


def move_a_column(small: nn.Module) -> None:
    column = small.get_parameter("model.layers.1.self_attn.o_proj.weight")[:, 1]
    column[2] += 1e-3 * column.norm()


def lose_a_bias(small: nn.Module) -> None:
    small.get_parameter("model.layers.0.self_attn.k_proj.bias")[1] = 0.0


def keep_the_scale_of_another_head_dim(small: nn.Module) -> None:
    attention = small.get_submodule("model.layers.1.self_attn")
    attention.scaling = (_head_dim(small) + 2) ** -0.5


def _head_dim(small: nn.Module) -> int:
    return int(small.get_submodule("model.layers.0.self_attn").head_dim)  # type: ignore[arg-type]


MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "two kept indices swapped": ("llama_gqa", swap_kept_indices),
    "heads permuted": ("llama_gqa", permute_heads),
    "a wrong rope pair": ("llama_gqa", pair_rotations_wrongly),
    "one column off by 1e-3 of its norm": ("llama_gqa", move_a_column),
    "a bias row lost": ("qwen2", lose_a_bias),
    "the softmax scale of another head_dim": ("llama_gqa", keep_the_scale_of_another_head_dim),
}


@functools.cache
def planned(name: str, kinds: tuple[str, ...], ratio: float = 0.2) -> tuple[Traced, Plan]:
    family = trace(build(name))
    return family, sir.plan(family.program, ratio=ratio, kinds=list(kinds), importance="random")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_thing_wrong_is_found(mutation: str, dtype: torch.dtype) -> None:
    name, mutate = MUTATIONS[mutation]
    family, plan = planned(name, ("ffn",))
    small, dense = sir.shear(family.model, plan).to(dtype), build(name).to(dtype)
    assert sir.verify(dense, small, plan, family.feed).sound
    with torch.no_grad():
        mutate(small)
    report = sir.verify(dense, small, plan, family.feed)
    assert not report.sound
    # Not by a hair's breadth: rounding explains a small part of what is wrong.
    assert report.gap > 1e3 * report.bound


def test_an_eps_that_does_not_follow_a_narrower_norm_is_found() -> None:
    family, plan = planned("llama_gqa", ("residual",))
    small = sir.shear(family.model, plan)
    assert sir.verify(family.model, small, plan).sound
    norm = small.get_submodule("model.layers.1.input_layernorm")
    assert norm.variance_epsilon != 1e-6
    norm.variance_epsilon = 1e-6
    assert not sir.verify(family.model, small, plan).sound


class Window(nn.Module):
    """Reads the last 32 positions; a cut of its 32 channels has nothing to do with that."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 32
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(self.up(x[:, -self.window :]).relu())
        return made


class Tempered(nn.Module):
    """An MLP with dropout, which training alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 20), nn.Linear(20, 8), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        made: torch.Tensor = self.down(self.drop(h))
        return made


class Untempered(Tempered):
    """The same, but for training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x) if self.training else super().forward(x)


def test_a_window_that_shrank_with_the_channels_is_found() -> None:
    torch.manual_seed(0)
    model = Window()
    plan = sir.plan(sir.trace(model), ratio=0.2)
    small = sir.shear(model, plan)
    assert (1, 37, 8) in sir.verify(model, small, plan).lengths
    small.window = small.up.out_features  # type: ignore[union-attr]
    report = sir.verify(model, small, plan)
    assert report.gap == float("inf")
    assert "1x3" in report.place


def test_training_is_compared_without_dropout_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Tempered().train()
    plan = sir.plan(sir.trace(model), ratio=0.2)
    small = sir.shear(model, plan)
    report = sir.verify(model, small, plan)
    assert report.sound
    assert "and training" in report.notes
    assert model.training
    assert small.training
    assert model.drop.p == 0.4
    small.__class__ = Untempered
    wrong = sir.verify(model, small, plan)
    assert not wrong.sound
    assert wrong.place == "training"


def test_a_cache_that_two_layers_share_is_found() -> None:
    family, plan = planned("llama_gqa", ("ffn",))
    small = sir.shear(family.model, plan)
    assert "and a step with a cache" in sir.verify(family.model, small, plan).notes
    small.get_submodule("model.layers.1.self_attn").layer_idx = 0
    wrong = sir.verify(family.model, small, plan)
    assert not wrong.sound
    assert wrong.place == "a step with a cache"


def test_the_report_says_gap_noise_and_bound() -> None:
    family, plan = planned("llama_gqa", ("ffn",))
    small = sir.shear(family.model, plan)
    report = sir.verify(family.model, small, plan)
    assert report.judge == "structure"
    # float32 is off by about its last places; the same amplification in float64 stays far below that.
    assert 1e-8 < report.noise / report.scale < 1e-5
    assert report.gap < report.bound < 1e-4 * report.noise
    with torch.no_grad():
        move_a_column(small)
    wrong = sir.verify(family.model, small, plan)
    assert wrong.judge == "numbers"
    with pytest.raises(sir.UnsoundError, match=r"differs from the masked original by \S+ in float64 at inputs "):
        wrong.raise_if_unsound()
    assert wrong.moved == pytest.approx(report.moved, rel=1e-6)


def test_what_the_dense_model_is_from_itself_with_a_cache_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from shear_backends.verify import tried

    def nearly(model: nn.Module, feed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (logits,) = tried.run(model, feed)
        return (logits * (1 + 1e-10),)

    monkeypatch.setattr(tried, "step_by_step", nearly)
    family, plan = planned("llama_gqa", ("ffn",))
    small = sir.shear(family.model, plan)
    report = sir.verify(family.model, small, plan)
    assert report.sound
    assert "and a step with a cache" in report.notes
    small.get_submodule("model.layers.1.self_attn").scaling = 1.0
    assert not sir.verify(family.model, small, plan).sound


def test_inputs_that_the_model_does_not_take_are_told() -> None:
    family, plan = planned("llama_gqa", ("ffn",))
    with pytest.raises(sir.PlanError, match="LlamaForCausalLM does not run on inputs 2x5: IndexError: "):
        sir.verify(family.model, family.model, plan, {"input_ids": torch.full((2, 5), 10_000)})


class Holding(nn.Module):
    """A hook of it holds on to its own parameter, which no copy can take along."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(8, 20), nn.Linear(20, 8), nn.Parameter(torch.ones(1))
        self.up.register_forward_hook(lambda _, args, made: made * self.gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(self.up(x).relu())
        return made


def test_a_copy_that_reads_the_original_is_refused() -> None:
    model = Holding().eval()
    plan = sir.plan(sir.trace(model, torch.randn(2, 8)), ratio=0.2)
    with pytest.raises(sir.ShearingError, match="a copy of Holding reads gate of the original, as a hook"):
        sir.shear(model, plan)
