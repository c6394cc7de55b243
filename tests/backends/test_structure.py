"""Proof by structure: one function in two spellings is equal, and whatever another function hides in is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from shear_backends.verify.sizes import longer
from shear_backends.verify.structure import first_difference
from tests.zoo import build

pytestmark = pytest.mark.lengths


class Says(nn.Module):
    """Two projections around a function of tensors that a test gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 7)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


X = torch.randn(2, 9, 5)


def differs(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> str:
    return first_difference(sir.trace(Says(one), X), sir.trace(Says(other), X))


def attend(scale: float | None) -> Callable[[Tensor], Tensor]:
    def attention(h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(h, h, h, scale=scale)

    return attention


SAME: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "chunk is a split": (
        lambda h: torch.cat(h.chunk(2, -1)[::-1], -1),
        lambda h: torch.cat(h.split([6, 6], 2)[::-1], -1),
    ),
    "a slice ends at its dim": (lambda h: h[:, 1:], lambda h: h[:, 1:9]),
    "a negative start counts from the end": (lambda h: h[:, -4:], lambda h: h[:, 5:]),
    "all of a dim is no slice": (lambda h: h[:, :, :12], lambda h: h),
    "-1 is what it comes to": (
        lambda h: h.view(2, 9, -1, 3).flatten(2),
        lambda h: h.reshape(2, 9, 4, 3).view(2, 9, 12),
    ),
    "copies are what they copy": (lambda h: h.contiguous().clone(), lambda h: h),
    "attention has a scale of its own": (attend(None), attend(12**-0.5)),
    "dropout is idle in evaluation": (lambda h: F.dropout(h, 0.3, False), lambda h: h),
    "dead code does nothing": (lambda h: (h.exp(), h)[1], lambda h: h),
}
OTHER: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "another window": (lambda h: h[:, -4:], lambda h: h[:, -3:], "aten.slice|slice"),
    "another scale of attention": (attend(12**-0.5), attend(9**-0.5), "scaled_dot_product_attention"),
    "another scale by hand": (lambda h: h * 0.25, lambda h: h * 0.125, "mul"),
    "another eps": (lambda h: F.layer_norm(h, (12,), eps=1e-5), lambda h: F.layer_norm(h, (12,), eps=1e-6), "layer_norm"),
    "another order": (lambda h: torch.cat([h[..., 4:], h[..., :4]], -1), lambda h: h, "cat|slice"),
    "another operator": (F.silu, F.gelu, "silu"),
    "another constant": (lambda h: h * torch.tensor(2.0), lambda h: h * torch.tensor(3.0), "constant"),
    "another way to lay out heads": (
        lambda h: h.view(2, 9, 4, 3).transpose(1, 2).reshape(2, 9, 12),
        lambda h: h.view(2, 9, 3, 4).transpose(1, 2).reshape(2, 9, 12),
        "reshape",
    ),
    "softmax of another axis": (lambda h: h.softmax(1), lambda h: h.softmax(2), "softmax"),
    "another mean": (lambda h: h.mean(1, keepdim=True), lambda h: h.sum(1, keepdim=True), "mean"),
    "another dtype between": (lambda h: h.double().exp().float(), torch.exp, "to|exp"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SAME))
def test_spellings_of_one_function_are_equal(case: str) -> None:
    assert differs(*SAME[case]) == ""


@pytest.mark.parametrize("case", list(OTHER))
def test_other_functions_are_not(case: str) -> None:
    one, other, said = OTHER[case]
    found = differs(one, other)
    assert any(name in found for name in said.split("|")), found


def test_what_draws_random_numbers_or_runs_python_is_not_decided() -> None:
    assert "draws random numbers" in differs(lambda h: h + torch.rand_like(h), lambda h: h + torch.rand_like(h))


class Recurrent(nn.Module):
    """Two layers of a GRU, with dropout between them in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 12)
        self.gru = nn.GRU(12, 9, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.up(x))[0]


def test_dropout_of_training_draws_nothing_in_evaluation() -> None:
    assert first_difference(sir.trace(Recurrent().eval(), X), sir.trace(Recurrent().eval(), X)) == ""


class Cut(nn.Module):
    """Whatever a module's plain numbers may mean: here a window of positions as long as there are channels."""

    def __init__(self, window: int = 32) -> None:
        super().__init__()
        self.window = window
        self.unread = 32
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x[:, -self.window :])))


def test_a_number_that_only_looks_like_a_size_stays() -> None:
    model = Cut().eval()
    small = sir.shear(model, sir.plan(sir.trace(model), ratio=0.2))
    assert (small.up.out_features, small.window, small.unread) == (26, 32, 32)
    x = torch.randn(3, 40, 8)
    assert small(x).shape == model(x).shape


class Conditional(nn.Module):
    """A forward that takes another way with longer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h.softmax(-1) if x.shape[1] > 20 else h)


def test_another_way_at_another_length_in_which_the_plan_is_wrong_is_refused() -> None:
    model = Conditional().eval()
    plan = sir.plan(sir.trace(model, torch.randn(3, 7, 8)), ratio=0.2)
    with pytest.raises(sir.ShearError, match=r"(?s)37.*softmax|softmax.*37"):
        sir.shear(model, plan)


class Implicit(nn.Module):
    """Attention whose scale is that of the width of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))
        self.o = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("std", [1e-4, 1e-2, 1.0])
def test_a_scale_of_narrower_heads_is_seen_however_small_the_weights(std: float) -> None:
    model = Implicit().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    plan = sir.plan(sir.trace(model), ratio=0.1, kinds=("head_dim",))
    with pytest.raises(sir.ShearingError, match="use the graph backend"):
        sir.shear(model, plan)


def test_a_longer_input_is_past_every_number_that_the_model_takes() -> None:
    rotary = build("mistral")
    assert next(longer(rotary, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}))["input_ids"].shape[1] > 67
    learned = build("gpt2")  # of 67 positions
    limit = next(longer(learned, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}))["input_ids"].shape[1]
    assert limit >= 61
    images = build("vit")
    assert not list(longer(images, {"pixel_values": torch.zeros(2, 3, 30, 30)}))


def test_the_dense_model_is_not_touched_by_the_search_for_lengths() -> None:
    model = build("gemma2")
    before = copy.deepcopy(model.state_dict())
    list(longer(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("Fake" in type(t).__name__ for t in (*model.parameters(), *model.buffers()))


ALIKE = ("gpt2", "bert", "modernbert")


@pytest.mark.parametrize(
    "name",
    ["llama_gqa", "mixtral", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gemma2", "t5", *ALIKE))],
)
def test_families_are_decided_by_structure_at_two_lengths(name: str) -> None:
    model = build(name)
    plan = sir.plan(sir.trace(model), ratio=0.25, kinds=("ffn", "kv_head"))
    small = sir.shear(model, plan)
    report = sir.verify(model, small, plan)
    assert report.sound
    assert report.judge == "structure"
    assert report.structure is not None
    assert len(report.structure.lengths) == 2
