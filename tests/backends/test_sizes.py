"""Inputs of other sizes: what a user gave is repeated, and what fits by chance at one size is seen at another."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.verify.numbers import masked
from shear_backends.verify.sizes import apart, longer, tiled
from shear_ir.frontend.feeds import tensors_in
from tests.zoo import build

pytestmark = pytest.mark.lengths

BACKENDS: list[Literal["module", "graph"]] = ["module", "graph"]


class Rows(nn.Module):
    """Lays tokens out as rows of a width that stands in its code as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.up(x).view(-1, 6).relu()
        return self.down(rows.view(*x.shape[:2], -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_that_fits_by_chance_is_right_at_every_size(backend: Literal["module", "graph"]) -> None:
    model, x = Rows().eval(), torch.randn(3, 7, 5)  # 3 * 7 * 4 divides by 6
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    small = sir.shear(model, plan, backend=backend)
    reference = masked(model, plan.kept)
    for batch, length in ((3, 7), (5, 11), (1, 1)):
        fresh = torch.randn(batch, length, 5)
        made = small(fresh)
        assert torch.allclose(made if isinstance(made, Tensor) else made[0], reference(fresh), atol=1e-6)


def test_verify_finds_a_view_that_fits_by_chance() -> None:
    model, x = Rows().eval(), torch.randn(3, 7, 5)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    broken = copy.deepcopy(model)
    right = sir.shear(model, plan)
    broken.up, broken.down = right.up, right.down
    assert broken(x).shape == (3, 7, 3)
    report = sir.verify(model, broken, plan)
    assert not report.sound
    assert "7x11x5" in report.place
    assert sir.verify(model, right, plan).lengths == ((3, 7, 5), (7, 11, 5), (1, 7, 5))
    assert sir.verify(model, right, plan, x).lengths == ((3, 7, 5),)


class Window(nn.Module):
    """Reads a list of features, as many positions of it as it has channels; says nothing of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 32
        self.one, self.two, self.down = nn.Linear(8, 32), nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, feats: list[Tensor], scale: float) -> Tensor:
        hidden = self.one(feats[0][:, -self.window :]) + self.two(feats[1][:, -self.window :])
        return scale * self.down(hidden.relu())  # type: ignore[no-any-return]


def test_inputs_of_the_user_are_lengthened_past_what_a_module_counts() -> None:
    model = Window().eval()
    given = {"feats": [torch.randn(2, 7, 8), torch.randn(2, 7, 6)], "scale": 0.5}
    (longest, *_) = longer(model, given)
    assert [tuple(t.shape) for t in tensors_in(longest).values()] == [(2, 37, 8), (2, 37, 6)]
    small = sir.shear(model, sir.plan(sir.trace(model, given), ratio=0.2))
    assert (small.one.out_features, small.window) == (26, 32)
    assert [len(shape) for shape in small.shear_record.proof.lengths] == [3, 3]


def test_rows_and_positions_are_repeated_where_it_is_clear_which_they_are() -> None:
    ids, mask, pictures = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 4, 5, 5)
    made = tiled({"ids": ids, "more": [mask, pictures], "scale": 2}, batch=3, length=5)
    assert made is not None
    assert made["ids"].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4], [0, 1, 2, 0, 1]]
    assert [tuple(t.shape) for t in made["more"]] == [(3, 5), (3, 4, 5, 5)]
    assert made["scale"] == 2
    assert tiled({"ids": ids, "others": torch.zeros(2, 4, dtype=torch.long)}, batch=None, length=5) is None
    assert tiled({"x": torch.randn(2, 4, 5, 5)}, batch=None, length=5) is None
    assert tiled({"x": torch.randn(2, 4), "y": torch.randn(3, 4)}, batch=5, length=None) is None


@pytest.mark.parametrize("name", ["llama_gqa", "vit"])
def test_sizes_apart_divide_nothing_and_fit_the_model(name: str) -> None:
    model = build(name)
    feed: dict[str, Any] = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    feed = {"pixel_values": torch.zeros(2, 3, 30, 30)} if name == "vit" else feed
    found = apart(model, feed)
    assert found is not None
    (before,), (after,) = feed.values(), found.values()
    free = (0,) if name == "vit" else (0, 1)
    assert after.shape[2:] == before.shape[2:]
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    for dim in free:
        assert after.shape[dim] != before.shape[dim]
        assert all(size % after.shape[dim] for size in taken)
