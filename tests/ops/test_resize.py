"""Every rewrite of shape constants: the cut graph computes what the original computes whose removed units are zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.ops.registry import resized_ops
from shear_passes.ops.traits import row_name
from shear_passes.rewrite.cuts import build_plan
from shear_tools.api.pipeline import analyses

WIDTH = 24


class Between(nn.Module):
    """A linear map, a function of its 24 features, and a map that reads the result."""

    def __init__(self, between: Callable[[Tensor], Tensor], read: int) -> None:
        super().__init__()
        self.make, self.read, self.between = nn.Linear(5, WIDTH), nn.Linear(read, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.between(self.make(x)))


class Normed(Between):
    """A norm with a weight of its own between the two."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda h: between(h, self.weight), WIDTH)
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)


class Convolved(nn.Module):
    """Convolutions of 24 channels, one of them in groups."""

    def __init__(self, middle: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv1d(5, WIDTH, 1), middle, nn.Conv1d(WIDTH, 3, 1)
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.after(self.middle(self.first(x.transpose(1, 2)))))


def heads(h: Tensor) -> Tensor:
    q = h.view(2, 7, 2, 12).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q.roll(1, 1), q).transpose(1, 2).reshape(2, 7, WIDTH)


def chosen(h: Tensor) -> Tensor:
    index = h.softmax(-1).topk(2, -1).indices
    return F.one_hot(index, WIDTH).sum(2) * h.softmax(-1)


def counted(h: Tensor) -> Tensor:
    index = h.softmax(-1).topk(2, -1).indices
    return torch.histc(index.float(), bins=WIDTH, min=0, max=WIDTH - 1) * h.softmax(-1)


def summed(h: Tensor) -> Tensor:
    index = h.softmax(-1).topk(2, -1).indices
    return torch.bincount(index.flatten(), minlength=WIDTH) * h.softmax(-1)


MADE: dict[str, Callable[[], nn.Module]] = {
    "view": lambda: Between(lambda h: h.view(2, 7, 4, 6).transpose(2, 3).reshape(2, 7, 24), 24),
    "unflatten": lambda: Between(lambda h: h.unflatten(-1, (4, 6)).sum(2), 6),
    "slice": lambda: Between(lambda h: torch.cat([h[..., 8:], h[..., :8]], -1), 24),
    "narrow": lambda: Between(lambda h: h.narrow(-1, 4, 12), 12),
    "select": lambda: Between(lambda h: h.view(2, 7, 4, 6).select(2, 2), 6),
    "split": lambda: Between(lambda h: torch.cat(h.split([10, 14], -1)[::-1], -1), 24),
    "chunk": lambda: Between(lambda h: torch.mul(*h.chunk(2, -1)), 12),
    "squeeze": lambda: Between(lambda h: h.view(2, 7, 24, 1).squeeze(-1), 24),
    "expand": lambda: Between(lambda h: h[:, :1].expand(2, 7, 24), 24),
    "repeat": lambda: Between(lambda h: h.repeat(1, 1, 2), 48),
    "tile": lambda: Between(lambda h: h.tile(2), 48),
    "repeat_interleave": lambda: Between(lambda h: h.repeat_interleave(2, -1), 48),
    "zeros": lambda: Between(lambda h: torch.cat([h, torch.zeros(2, 7, 24)], 1), 24),
    "new_zeros": lambda: Between(lambda h: torch.cat([h, h.new_zeros(2, 7, 24)], 1), 24),
    "arange": lambda: Between(lambda h: h * torch.arange(24.0), 24),
    "linspace": lambda: Between(lambda h: h * torch.linspace(1, 3, 24), 24),
    "scaled_dot_product_attention": lambda: Between(heads, 24),
    "one_hot": lambda: Between(chosen, 24),
    "histc": lambda: Between(counted, 24),
    "bincount": lambda: Between(summed, 24),
    "rms_norm": lambda: Normed(lambda h, w: F.rms_norm(h, (24,), w, 1e-6)),
    "mean": lambda: Normed(lambda h, w: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * w),
    "conv1d": lambda: Convolved(nn.Conv1d(24, 24, 3, padding=1, groups=4)),
    "conv_transpose1d": lambda: Convolved(nn.ConvTranspose1d(24, 24, 3, padding=1, groups=4)),
    "group_norm": lambda: Convolved(nn.Conv1d(24, 24, 1), nn.GroupNorm(4, 24)),
}
ALIKE = {
    "reshape", "unsafe_view", "broadcast_to", "full", "ones", "empty", "new_ones", "new_full", "new_empty",
    "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "convolution", "split_with_sizes", "tensor_split",
    "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
}  # fmt: skip
"""Operators whose constants are rewritten by the same function as those of one above."""


@pytest.mark.parametrize("name", MADE)
def test_a_cut_graph_is_the_masked_original(name: str) -> None:
    torch.manual_seed(3)
    model = MADE[name]().double().eval()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    program = sir.trace(model, x)
    assert any(name in str(node.target) for node in program.calls()), "the operator is not in the graph"
    groups = sir.groups(program)
    rng = np.random.default_rng(1)
    kept = {
        g: np.sort(rng.permutation(g.size)[: max(g.least, (2 * g.size) // 3)])
        for g in groups.of_axes
        if (g.prunable or g.rescalable) and g.size > 1
    }
    assert kept, [str(g) for g in groups]
    plan = build_plan(groups, analyses(program).get(MeasureCosts()), kept)
    small = sir.shear(model, plan, backend="graph", inputs=x)
    report = sir.verify(model, small, plan, x)
    assert report.sound, str(report)
    with torch.no_grad():
        assert (small(x)[0] - model(x)).abs().max() > 1e-3, "the cut changes nothing, so the comparison shows nothing"


def test_every_rewrite_is_tried() -> None:
    assert {row_name(op) for op in resized_ops()} == set(MADE) | ALIKE
