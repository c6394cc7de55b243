"""Random programs: whatever operators follow each other, no kept entry hangs on a removed one.

The sizes are few, so that axes often could be mixed up; every value can be read again later, also after a write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from shear_ir.frontend.export import trace
from shear_ir.manager import AnalysisManager
from shear_passes.analysis.infer_axes import InferAxes
from shear_passes.analysis.vanish import FindZeros
from tests.oracle.locality import check_calls, forget_outputs

Call = Callable[..., Any]
Step = tuple[Call, tuple[int, ...]]

UNARY: dict[str, Call] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "neg": torch.neg,
    "square": torch.square,
    "exp": lambda x: torch.exp(-x.abs()),
    "unit": lambda x: F.normalize(x, dim=-1),
    "double": lambda x: torch.cat([x, -x], -1),
    "halves": lambda x: x.chunk(2, -1),
    "even and odd": lambda x: (x[..., ::2], x[..., 1::2]),
    "glu": lambda x: F.glu(x, -1) if x.shape[-1] % 2 == 0 else x,
    "turn": lambda x: x.transpose(0, -1),
    "scores": lambda x: x @ x.transpose(-1, -2) if x.dim() > 1 else x,
    "softmax": lambda x: x.softmax(-1),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "sum": lambda x: x.sum(-1) if x.dim() > 1 else x,
    "mean": lambda x: x.mean(0) if x.dim() > 1 else x,
    "flatten": lambda x: x.flatten(-2) if x.dim() > 1 else x,
    "copies": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "repeat": lambda x: x.repeat_interleave(2, dim=0),
    "tile": lambda x: x.repeat(*(1 for _ in range(x.dim() - 1)), 2),
    "pad": lambda x: F.pad(x, (0, 1)),
    "first": lambda x: x[0] if x.dim() > 1 else x,
    "write": lambda x: (y := x.clone(), y[..., :2].add_(1.0))[0],
    "scale in place": lambda x: (y := x.clone(), y.mul_(2.0))[0],
}
"""Operators of one value; where one does not fit, it hands the value on."""

PAIRS: dict[str, Call] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "write": lambda x, y: x.clone().copy_(y),
    "stack": lambda x, y: torch.stack([x, y], -1),
    "cat": lambda x, y: torch.cat([x, y], 0),
    "where": lambda x, y: torch.where(x > 0, x, y),
}
"""Operators of two values of one shape."""

SIZES = (2, 3, 4, 6, 8, 12)
LARGEST = 600


class Random(nn.Module):
    """Values that grow from parameters, step by step; the last two are the output."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.owned = nn.ParameterList(nn.Parameter(torch.randn(shape), requires_grad=False) for shape in shapes)
        self.steps: list[Step] = []
        self.values: list[Tensor] = list(self.owned)

    def take(self, call: Call, *places: int) -> None:
        """Do one step now, to know its shapes, and again in every forward."""
        made = _results(call(*(self.values[p] for p in places)))
        if all(0 < t.numel() <= LARGEST and t.dim() < 5 for t in made):
            self.values.extend(made)
            self.steps.append((call, places))

    def forward(self, unused: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor] = list(self.owned)
        for call, places in self.steps:
            values.extend(_results(call(*(values[p] for p in places))))
        return tuple(values[-2:])


def _results(made: Any) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)


@st.composite
def models(draw: st.DrawFn) -> Random:
    shapes = st.lists(st.sampled_from(SIZES), min_size=1, max_size=3).map(tuple)
    model = Random(draw(st.lists(shapes, min_size=2, max_size=5)))
    for _ in range(draw(st.integers(1, 12))):
        place = draw(st.integers(0, len(model.values) - 1))
        shape = model.values[place].shape
        kind = draw(st.sampled_from(["unary", "pair", "view", "slice", "linear", "broadcast"]))
        if kind == "unary":
            name = draw(st.sampled_from(sorted(UNARY)))
            note(f"{len(model.values)} = {name}({place})")
            model.take(UNARY[name], place)
        elif kind == "view":
            target = draw(st.sampled_from(_views(shape)))
            note(f"{len(model.values)} = view({place}, {target})")
            model.take(lambda x, target=target: x.reshape(target), place)
        elif kind == "slice":
            start, end = sorted(draw(st.tuples(st.integers(0, shape[-1]), st.integers(0, shape[-1]))))
            note(f"{len(model.values)} = {place}[..., {start}:{end}]")
            model.take(lambda x, start=start, end=end: x[..., start:end], place)
        else:
            others = [i for i, value in enumerate(model.values) if _fits(kind, shape, value.shape)]
            if others:
                calls = {"linear": F.linear} if kind == "linear" else PAIRS
                names = ["add", "mul"] if kind == "broadcast" else sorted(calls)
                name, other = draw(st.sampled_from(names)), draw(st.sampled_from(others))
                note(f"{len(model.values)} = {name}({place}, {other})")
                model.take(calls[name], place, other)
    return model


def _fits(kind: str, shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a second operand of this shape can go with a first one of ``shape``."""
    if kind == "linear":
        return len(other) == 2 and other[-1] == shape[-1]
    return other == (shape if kind == "pair" else shape[-len(other) :])


def _views(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Other shapes of as many elements: a dim split in two, or two dims taken together."""
    views = [(math.prod(shape),)]
    for place, size in enumerate(shape):
        views += [(*shape[:place], size // d, d, *shape[place + 1 :]) for d in range(2, size) if size % d == 0]
    views += [(*shape[:p], shape[p] * shape[p + 1], *shape[p + 2 :]) for p in range(len(shape) - 1)]
    return views


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(models())
def test_random_programs_are_local(model: Random) -> None:
    feed = {"unused": torch.zeros(2)}
    analyses = AnalysisManager(trace(model, feed))
    axes = analyses.get(InferAxes())
    forget_outputs(axes)
    check_calls(model, axes, analyses.get(FindZeros()), feed, rounds=2)
