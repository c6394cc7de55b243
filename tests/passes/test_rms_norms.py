"""Layer norms of a centred stream are RMS norms: the same function, which can then be turned and cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from shear_backends.verify.numbers import evaluation, run
from shear_ir.errors import PlanError
from shear_ir.frontend.feeds import inputs_of
from tests.zoo import build, randomised


def outputs(model: nn.Module, feed: Any) -> tuple[Tensor, ...]:
    with evaluation(model), torch.no_grad():
        return run(model, feed)


@pytest.mark.filterwarnings("ignore:.*(is untied|gets a bias)")
@pytest.mark.parametrize("name", ["gpt2", "opt", "stablelm", "mpt", "vit"])
def test_rms_norms_of_a_centred_stream_are_exactly_its_layer_norms(name: str) -> None:
    model = build(name).double()
    changed = sir.with_rms_norms(model)
    assert not any(isinstance(m, nn.LayerNorm) for m in changed.modules())
    assert sum(isinstance(m, nn.RMSNorm) for m in changed.modules()) > 2
    feed = inputs_of(model, None)
    for mine, other in zip(outputs(changed, feed), outputs(model, feed), strict=True):
        assert mine.dtype == torch.float64
        assert float((mine - other).abs().max()) <= 1e-12


@pytest.mark.filterwarnings("ignore:.*(is untied|gets a bias)")
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_a_stream_behind_layer_norms_is_rotated_cut_verified_and_read_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    feed = inputs_of(model, None)
    rotated = sir.rotate(model, "residual", data=[feed])
    plan = sir.plan(sir.trace(rotated), ratio=0.2, kinds=("residual",), importance="order", stock=False)
    assert {cut.kind for cut in plan.cuts} == {"residual"}
    for backend in ("graph", "module"):
        small = sir.shear(rotated, plan, backend=backend)
        sir.verify(rotated, small, plan).raise_if_unsound()
    sir.save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(sir.load(tmp_path / "small")(**feed).logits, small(**feed).logits)


class PreNorm(nn.Module):
    """A stream of 12 that a block of 20 adds to; ``reads``: what else reads it."""

    def __init__(self, reads: str = "") -> None:
        super().__init__()
        self.reads = reads
        self.table, self.head = nn.Embedding(31, 12), nn.Linear(12, 7)
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12, eps=1e-3)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if self.reads == "a gate":
            x = x.tanh()
        x = x + self.down(F.relu(self.up(self.norm(x))))
        if self.reads == "a sum":
            return self.head(self.last(x) + x)
        logits: Tensor = self.head(self.last(x))
        return logits + x.mean(-1, keepdim=True) if self.reads == "a mean" else logits


@pytest.mark.parametrize(
    ("reads", "why"),
    [
        ("a sum", "add at the root reads the result of last, and only products may"),
        ("a mean", "mean at the root reads it without a norm"),
        ("a gate", "tanh at the root writes to it, which is not linear in parameters alone"),
    ],
)
def test_another_reader_of_the_stream_is_named(reads: str, why: str) -> None:
    ids = torch.arange(10).reshape(2, 5)
    model = randomised(PreNorm().eval()).double()
    changed = sir.with_rms_norms(model, ids)
    assert torch.allclose(changed(ids), model(ids), atol=1e-12, rtol=0)
    assert [m.eps for m in changed.modules() if isinstance(m, nn.RMSNorm)] == [1e-5, 1e-3]
    with pytest.raises(PlanError, match=f"cannot become RMS norms: {why}"):
        sir.with_rms_norms(randomised(PreNorm(reads).eval()), ids)


def test_half_precision_is_rounded_once() -> None:
    ids = torch.arange(10).reshape(2, 5)
    model = randomised(PreNorm().eval()).bfloat16()
    changed, exact = (sir.with_rms_norms(m, ids) for m in (model, copy.deepcopy(model).float()))
    wide = dict(exact.named_parameters())
    assert all(torch.equal(p, wide[n].bfloat16()) for n, p in changed.named_parameters())
    assert {p.dtype for p in changed.parameters()} == {torch.bfloat16}


def test_post_norm_models_are_refused_and_others_stay() -> None:
    with pytest.raises(PlanError, match=r"add at bert.* reads the result of bert.embeddings.LayerNorm, and only"):
        sir.with_rms_norms(build("bert"))
    model = build("llama_gqa")
    assert sir.with_rms_norms(model) is model
