"""``typed`` shows what the rules make of one expression over tensors of given sizes, and tries it with numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shear_ir.axes import Axis, Dims, Freezes, Hold, show
from shear_ir.frontend.export import trace
from shear_ir.manager import AnalysisManager
from shear_ir.nodes import operands
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.vanish import FindZeros, Zeros
from tests.oracle.locality import check_calls, forget_outputs


class Expression(nn.Module):
    """``call`` on tensors the module owns: a size makes a parameter, a tensor a buffer. Its input says nothing."""

    def __init__(self, call: Callable[..., Any], tensors: dict[str, tuple[int, ...] | Tensor]) -> None:
        super().__init__()
        self.call, self.names = call, tuple(tensors)
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(value), requires_grad=False))

    def forward(self, unused: Tensor) -> Any:
        return self.call(**{name: getattr(self, name) for name in self.names})


def typed(call: Callable[..., Any], *, rounds: int = 3, **tensors: tuple[int, ...] | Tensor) -> str:
    """The dims of ``tensors`` and of the result of ``call``, what holds them and where the result is zero.

    Atoms are a, b, c in order of appearance; ``!`` marks one that is held, ``~`` one that only a mean holds. That the
    result is the model's output does not count. ``zero:`` lists the atoms at whose removed indices the result is zero.
    The expression then runs with random units removed: see ``tests.oracle``.
    """
    model = Expression(call, tensors)
    feed = {"unused": torch.zeros(2)}
    analyses = AnalysisManager(trace(model, feed))
    axes = analyses.get(InferAxes())
    forget_outputs(axes)
    zeros = analyses.get(FindZeros())
    text = "\n".join(_lines(axes, zeros, list(tensors)))
    check_calls(model, axes, zeros, feed, rounds=rounds)
    return text


def _lines(axes: Axes, zeros: Zeros, names: list[str]) -> Iterator[str]:
    letters: dict[Axis, str] = {}
    freezes = Freezes(zeros.frozen)

    def name(atom: Axis) -> str:
        place = len(letters)
        letter = letters.setdefault(atom, chr(97 + place % 26) + (str(place // 26) if place > 25 else ""))
        held = freezes.of(atom)
        return letter + ("" if held is None else "~" if held.hold is Hold.NORM else "!")

    def line(dims: Dims) -> str:
        return "[" + ", ".join(show(d, name) for d in dims) + "]"

    width = max(map(len, names), default=0)
    for tensor in names:
        yield f"{tensor:{width}} {line(axes.of_param[tensor])}"
    results = operands(axes.program.nodes[-1])
    for node in results:
        for dims in axes.of_node[node.name]:
            yield f"{'->':{width}} {line(dims)}"
    yield from _zero(axes, zeros, letters)
    yield from _reasons(letters, freezes)


def _zero(axes: Axes, zeros: Zeros, letters: dict[Axis, str]) -> Iterator[str]:
    found = [
        " ".join(letters[a] for a in letters if a in zeros.of_node[node.name])
        for node in operands(axes.program.nodes[-1])
    ]
    if any(found):
        yield "zero: " + ", ".join(text or "-" for text in found)


def _reasons(letters: dict[Axis, str], freezes: Freezes) -> Iterator[str]:
    held: dict[str, list[str]] = {}
    for atom, letter in letters.items():
        found = freezes.of(atom)
        if found is not None:
            # An atom that was solved since has a number but no letter.
            held.setdefault(re.sub(r"\ba\d+:", "", found.reason), []).append(letter)
    for reason, names in held.items():
        yield f"{' '.join(names)}: {reason}"
