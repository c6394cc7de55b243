"""What a module computed from its parameters and kept is no constant: traces, masks and cuts read the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shear_backends.module.shear import shear_module
from tests.roads import outputs, trace
from tests.zoo import randomised


class KeptBias(nn.Module):
    """Attention that computes its table of biases once and keeps it until it is trained."""

    def __init__(self, hidden: int = 12, heads: int = 4, length: int = 7) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.biases = nn.Parameter(torch.zeros(heads, length))
        self.register_buffer("places", (torch.arange(length)[:, None] - torch.arange(length)).abs(), persistent=False)
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> KeptBias:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if "biases" not in self.kept:
            self.kept["biases"] = self.biases[:, self.places]
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT + self.kept["biases"]).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_table_that_is_kept_is_read_anew() -> None:
    model = randomised(KeptBias())
    feed = {"x": torch.randn(3, 7, 12)}
    outputs(model, feed)
    kept = dict(model.kept)
    assert kept
    family = trace(model, feed)
    assert not any(p.kind == "constant" for p in family.program.params.values())
    assert model.kept == kept  # as it was, and no tensor of the trace
    (heads,) = family.able("kv_head")
    plan = family.without({heads: [1]})
    small = shear_module(model, family.groups, plan, feed)
    assert family.report(small, plan).sound


class Merging(nn.Linear):
    """Folds a change into its weight for evaluation, and takes it out to be trained."""

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.change, self.merged = nn.Parameter(torch.randn(6, 5)), False

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            self.weight.data += self.change.data * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)


def test_a_module_that_keeps_nothing_is_not_trained_for_a_trace() -> None:
    model = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(6, 4)).eval()
    before = [p.clone() for p in model.parameters()]
    trace(model, {"input": torch.randn(3, 5)})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
