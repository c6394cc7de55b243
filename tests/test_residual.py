"""The width of the residual stream: refused by default, exact when asked for, where no norm centres it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_passes.rewrite.cuts import masks_of
from shear_passes.rewrite.rescale_norm import NormFix, norm_fixes
from tests.roads import outputs, same, trace, traced, units


def width(name: str) -> str:
    (group,) = [g for g in traced(name).groups if g.kind == "residual"]
    assert not group.prunable
    return group.reason


def test_llama_keeps_its_width_unless_asked() -> None:
    assert "a mean (RMS normalisation) runs over the axis" in width("llama_gqa")
    plan = sir.plan(traced("llama_gqa").program, ratio=0.2)
    assert {c.kind for c in plan.cuts} == {"kv_head", "ffn"}
    assert "RMS normalisation" in plan.frozen["h"]


def test_a_centring_norm_refuses_and_says_why() -> None:
    assert "layer normalisation runs over the axis and centres it, which no rescaling can mend" in width("gpt2")
    with pytest.raises(
        sir.PlanError, match="residual cannot be cut: layer normalisation runs over the axis and centres"
    ):
        sir.plan(traced("gpt2").program, ratio=0.1, kinds=["residual"])


NARROW = ("llama_gqa", "gemma2", "olmo2")
ALIKE = ("phi3", "t5", "llama_mqa", "qwen3", "gemma3_text", "granite")


@pytest.mark.parametrize("name", [*NARROW, *(pytest.param(name, marks=pytest.mark.thorough) for name in ALIKE)])
def test_a_narrower_stream_with_rescaled_norms_is_the_masked_original(name: str, tmp_path: Path) -> None:
    family = traced(name)
    plan = sir.plan(family.program, ratio=0.2, kinds=["residual"], importance="random")
    small = sir.shear(family.model, plan)
    for each in (small, family.sheared_graph(plan)):
        report = sir.verify(family.model, each, plan)
        assert report.max_abs_diff <= 1e-5
        assert report.moved > 0.05
    assert same(outputs(sir.load(sir.save(small, tmp_path / "out").path), family.feed), outputs(small, family.feed))


def test_width_heads_and_channels_go_together() -> None:
    family = traced("llama_gqa")
    plan = sir.plan(family.program, ratio=0.5, kinds=["residual", "kv_head", "ffn"], importance="random", round_to=4)
    assert {c.kind for c in plan.cuts} == {"residual", "kv_head", "ffn"}
    for backend in ("graph", "module"):
        assert sir.verify(family.model, sir.shear(family.model, plan, backend=backend), plan).max_abs_diff <= 1e-5  # type: ignore[arg-type]


def test_a_narrower_llama_is_stock(tmp_path: Path) -> None:
    family = traced("llama_gqa")
    # Llama's config wants a width that the number of heads divides, which is 8.
    plan = sir.plan(family.program, ratio=0.25, kinds=["residual"], round_to=8)
    small = sir.shear(family.model, plan)
    saved = sir.save(small, tmp_path / "out")
    assert saved.stock, saved.note
    again = type(family.model).from_pretrained(saved.path)  # type: ignore[attr-defined]
    assert again.config.hidden_size == 24
    assert again.config.rms_norm_eps == pytest.approx(family.model.config.rms_norm_eps * 32 / 24)  # type: ignore[union-attr]
    assert same(outputs(again, family.feed), outputs(small, family.feed))


class Norm(nn.Module):
    """RMS norm in the precision of its input; ``offset``: scales by ``offset + weight``, as Gemma's does by 1."""

    def __init__(self, width: int, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 - offset + 0.3 * torch.randn(width))
        self.offset = offset
        # Large enough that forgetting to rescale it would show.
        self.eps = 0.25

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight if self.offset == 0.0 else self.weight + self.offset
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * scale


class Stream(nn.Module):
    """Blocks that read a residual stream through norms."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.stem = nn.Linear(9, 22)
        self.norms = nn.ModuleList([Norm(22, offset) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(22, 14) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(14, 22) for _ in range(2)])
        self.head = nn.Linear(22, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.tanh(up(norm(x))))
        return self.head(self.norms[-1](x))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["graph", "module"])
def test_in_double_precision_the_rescaled_stream_is_the_masked_one(backend: str, offset: float) -> None:
    torch.manual_seed(1)
    family = trace(Stream(offset).double().eval())
    (group,) = [g for g in family.groups if g.kind == "residual"]
    plan = family.without({group: units(group, 0.4)})
    report = sir.verify(family.model, sir.shear(family.model, plan, backend=backend), plan)  # type: ignore[arg-type]
    assert report.max_abs_diff <= 1e-12
    assert report.moved > 0.05


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_rescaled_norm_equals_the_masked_norm(offset: float) -> None:
    torch.manual_seed(2)
    family = trace(Stream(offset).double().eval())
    (group,) = [g for g in family.groups if g.kind == "residual"]
    plan = family.without({group: units(group, 0.4)})
    fixes = norm_fixes(family.groups, masks_of(family.groups, plan.cuts))
    assert [(f.module, f.parameter, f.offset) for f in fixes] == [
        (f"norms.{i}", f"norms.{i}.weight", offset) for i in range(3)
    ]
    kept = torch.from_numpy(plan.cuts[0].kept)
    small = sir.shear(family.model, plan)
    x = torch.randn(50, 22, dtype=torch.float64)
    masked = torch.zeros_like(x).index_copy_(1, kept, x[:, kept])
    for old, new in zip(family.model.norms, small.norms, strict=True):  # type: ignore[arg-type]
        assert new.eps == pytest.approx(old.eps * 22 / len(kept))
        assert (old(masked)[:, kept] - new(x[:, kept])).abs().max() <= 1e-12


def test_a_norm_without_a_weight_cannot_carry_the_factor() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(9, 22)
            self.head = nn.Linear(22, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    family = trace(Bare().eval())
    group = next(g for g in family.groups if g.rescalable)
    plan = family.without({group: units(group, 0.4)})
    with pytest.raises(sir.ShearingError, match="has no weight that could carry the factor of a narrower axis"):
        sir.shear(family.model, plan)
    assert sir.verify(family.model, sir.shear(family.model, plan, backend="graph"), plan).sound


def test_a_mean_that_does_more_than_divide_has_no_factor_for_a_weight() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(9, 22)
            self.weight = nn.Parameter(torch.ones(22))
            self.head = nn.Linear(22, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.weight * x * torch.tanh(x.pow(2).mean(-1, keepdim=True)))

    family = trace(Centred().eval())
    group = next(g for g in family.groups if g.rescalable)
    plan = family.without({group: units(group, 0.4)})
    with pytest.raises(sir.ShearingError, match="is no division by it or by its root"):
        sir.shear(family.model, plan)
    assert sir.verify(family.model, sir.shear(family.model, plan, backend="graph"), plan).sound


def test_a_fix_says_what_becomes_of_a_norm() -> None:
    family = traced("gemma3_text")
    plan = family.without({g: range(8) for g in family.groups if g.kind == "residual"})
    fixes = norm_fixes(family.groups, masks_of(family.groups, plan.cuts))
    assert fixes[-1] == NormFix("model.norm", 1e-6, "model.norm.weight", 1.0, 32 / 24)
