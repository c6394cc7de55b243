"""The strategy: inputs, some steps, and readers for what nobody has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hypothesis import strategies as st

from tests.oracle.fuzz import blocks, layers, lines
from tests.oracle.fuzz.draft import Choose, Draft, Misfit, Sketch

Step = Callable[[Draft, Choose], None]

_LINES = (
    (lines.ELEMENTWISE, lines.line, 12), (lines.NOT_ZERO, lines.line, 5), (lines.BINARY, lines.line, 12),
    (lines.DIVISORS, lines.line, 4), (lines.OVER_A_DIM, lines.line, 6), (lines.VIEWS, lines.line, 8), (lines.PARTS, lines.line, 6),
    (lines.SEVERAL, lines.several, 5), (lines.PRODUCTS, lines.line, 4), (lines.POSITIONS, lines.line, 5),
    (lines.WRITES, lines.write, 3),
)  # fmt: skip


def _from(templates: Sequence[str], add: Callable[[Draft, Choose, str], Any], draft: Draft, choose: Choose) -> None:
    add(draft, choose, choose.one(templates))


KINDS: list[Step] = []
for _made, _weight in (*layers.STEPS, *blocks.BLOCKS):
    KINDS += [_made] * _weight
for _templates, _add, _weight in _LINES:
    KINDS += [partial(_from, _templates, _add)] * _weight


def inputs(draft: Draft, choose: Choose) -> None:
    """One or two of: a sequence, an image, a vector, numbers of tokens."""
    kind = choose.int(0, 5)
    if kind <= 1:
        draft.input("x", 2, choose.one((3, 5)), choose.size())
    elif kind == 2:
        draft.input("image", 2, choose.one((3, 4)), choose.one((4, 5)), 4)
    elif kind == 3:
        draft.input("vector", 3, choose.size())
    elif kind == 4:
        draft.input("ids", 2, 5)
        layers.table(draft, choose)
    else:
        draft.input("x", 2, 5, choose.size())
        draft.input("other", *choose.one(((2, 5, 4), (2, 3, 6), (2, 6), (2, 3, 4, 4))))


def first_layer(draft: Draft, choose: Choose) -> None:
    """Width of the model's own: the input's is frozen."""
    x = list(draft.values)[-1]
    shape = draft.shape(x)
    if len(shape) == 4:
        draft.emit(f"{draft.module(f'nn.Conv2d({shape[1]}, {choose.size()}, {choose.one((1, 3))}, padding=1)')}({x})")
    else:
        draft.emit(f"{draft.module(f'nn.Linear({shape[-1]}, {choose.size()})')}({x})")


def head(draft: Draft, choose: Choose, name: str) -> str:
    """A reader that sums over the last dim, over dim 1, or over all but the first; seldom the value itself."""
    shape = draft.shape(name)
    way = choose.int(0, 9)
    if way == 0 or not shape:
        return name
    if len(shape) > 2 and way <= 4:
        name = draft.emit(f"{name}.flatten(1)")
    elif len(shape) > 1 and way <= 6:
        name = draft.emit(f"torch.tensordot({name}, {draft.param(shape[1], 5)}, dims=([1], [0]))")
    shape = draft.shape(name)
    return draft.emit(f"F.linear({name}, {draft.param(7, shape[-1], share=0)})")


def _read(returns: list[str], name: str, draft: Draft, choose: Choose) -> None:
    returns.append(head(draft, choose, name))


def draft_program(choose: Choose, longest: int = 9) -> Sketch:
    """Between one step and ``longest``; every value that nobody has read goes through a head or is returned."""
    draft = Draft(choose)
    inputs(draft, choose)
    draft.attempt(first_layer)
    for _ in range(choose.int(1, longest)):
        draft.attempt(choose.one(KINDS))
    unread = [n for n in draft.values if n not in draft.read and n not in draft.inputs]
    returns: list[str] = []
    for name in unread[-3:] or list(draft.values)[-1:]:
        draft.attempt(partial(_read, returns, name))
    return draft.finish(returns or list(draft.values)[-1:])


@st.composite
def programs(draw: st.DrawFn, longest: int = 9) -> Sketch:
    """Random programs."""
    return draft_program(Choose(lambda low, high: draw(st.integers(low, high))), longest)


__all__ = ["Misfit", "draft_program", "programs"]
