"""Proof by structure: two programs that make the same calls on the same tensors compute the same function.

Nothing is run and no weight is read, so there is no rounding, and the size of the model does not matter. Programs are
compared call by call in a canonical form, in which spellings of one function are one: a chunk is a split by sizes, the
ends of a slice stop at its dim, a size of -1 is what it comes to, views and reshapes are told by their result, copies
are what they copy, devices are left out, and what no output needs is gone. What differs after that may still be the
same function: then this judge says nothing, and another one has to measure.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shear_ir.program import Program, TensorType

aten = torch.ops.aten

CallLine = tuple[Any, ...]
"""One call: the operator, its canonical arguments, and the types of its results."""

_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_copy"}
"""Each lays the same entries, in the same order, out in the shape of its result."""
_COPIES = {"contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy", "to"}
"""The same values, where the dtype is the same."""
_PLACES = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"}
"""Arguments that say where a tensor lies and nothing of its values."""
_DIGITS = 12
"""Of floats that came about in two ways (``8**-0.5``, ``1 / sqrt(8)``)."""
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout"}
_DIM = {"split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"}


@dataclass(frozen=True)
class Canonical:
    """A program in canonical form: equal forms are equal functions of equally named tensors.

    ``unknown``: why nothing can be said of it, such as a call that runs Python code; empty else.
    """

    lines: tuple[CallLine, ...]
    unknown: str = ""


@dataclass(frozen=True)
class Structure:
    """What proof by structure says of a sheared model. ``equal``: its program is the sheared one.

    ``lengths``: the shapes of the main input at which it was compared. ``why``: where the two part, else empty; they
    may compute the same function all the same.
    """

    equal: bool
    lengths: tuple[tuple[int, ...], ...] = ()
    why: str = ""

    def __str__(self) -> str:
        tried = ", ".join("x".join(map(str, shape)) for shape in self.lengths)
        return f"equal programs over equal tensors, at {tried}" if self.equal else f"not decided: {self.why}"


def canonical(program: Program) -> Canonical:
    """The canonical form of ``program``; linear in the number of its nodes."""
    return _Writer(program).run()


def first_difference(one: Program, other: Program) -> str:
    """Where two programs part, as a sentence about ``other``; empty where they are one function of their tensors."""
    a, b = canonical(one), canonical(other)
    if a.unknown or b.unknown:
        return a.unknown or b.unknown
    for mine, theirs in itertools.zip_longest(a.lines, b.lines):
        if mine != theirs:
            return f"{_told(mine)} has become {_told(theirs)}"
    return ""


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[fx.Node, Any] = {}
        self.lines: list[CallLine] = []
        self.unknown = ""
        self.writes = any(_mutable(node) for node in program.nodes)

    def run(self) -> Canonical:
        live = self._live()
        for node in self.program.nodes:
            if node not in live:
                continue
            if node.op == "placeholder":
                self.names[node] = self._placeholder(node)
            elif node.op == "output":
                self.lines.append(("output", self._value(node.args[0])))
            elif node.op == "call_function":
                self._call(node)
            else:
                self.unknown = self.unknown or f"{node.op} has no canonical form"
        return Canonical(tuple(self.lines), self.unknown)

    def _live(self) -> set[fx.Node]:
        live: set[fx.Node] = set()
        for node in reversed(self.program.nodes):
            if node.op == "output" or _mutable(node) or any(user in live for user in node.users):
                live.add(node)
        return live

    def _placeholder(self, node: fx.Node) -> Any:
        param = self.program.param(node)
        if param is None:
            return ("input", node.name)
        if param.kind != "constant":
            return ("@", param.name, param.type)
        return ("constant", *self._content(self.program.constants[param.name]))

    def _content(self, tensor: Tensor) -> CallLine:
        if tensor.is_meta:
            self.unknown = self.unknown or "it holds a constant whose values are not known"
            return ()
        raw = tensor.detach().cpu().contiguous()
        data = raw.flatten().view(torch.uint8) if raw.numel() and raw.dim() else raw.reshape(-1).view(torch.uint8)
        return tuple(raw.shape), raw.dtype, hashlib.sha256(data.numpy().tobytes()).hexdigest()

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, place = node.args
            self.names[node] = ("part", self._value(source), place)
            return
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "shear_ir":
            self.unknown = self.unknown or f"{node.target} runs code that a program does not show"
            return
        same = self._same(node)
        if same is not None:
            self.names[node] = self.names[same]
            return
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _settled(node):
            self.unknown = self.unknown or f"{node.target} draws random numbers"
        types = self.program.types.get(node.name, ())
        self.names[node] = ("%", len(self.lines))
        self.lines.append((*self._form(node, types), types))

    def _same(self, node: fx.Node) -> fx.Node | None:
        """The operand whose values are all that ``node`` is; None for any other call. Never where memory is shared."""
        name, source = _name(node), node.args[0] if node.args else None
        if self.writes or not isinstance(source, fx.Node):
            return None
        mine, its = self.program.type(node), self.program.type(source)
        if mine != its or its is None:
            return None
        copied = name in _COPIES or name in _RESHAPES or name == "expand"
        whole = name == "slice" and self._bounds(node, its)[1:] == (0, its.shape[self._bounds(node, its)[0]], 1)
        idle = name in _DROPOUTS and _idle(node)
        return source if copied or whole or idle else None

    def _form(self, node: fx.Node, types: tuple[TensorType, ...]) -> CallLine:
        name = _name(node)
        source = node.args[0] if node.args else None
        its = self.program.type(source) if isinstance(source, fx.Node) else None
        if name in _RESHAPES and not self.writes:
            return "reshape", self._value(source)
        if name in _RESHAPES or name == "expand":  # sizes are those of the result
            return name, self._value(source)
        if name in _DIM and its is not None:
            along = _argument(node, "dim", 2, 0)
            return "split", self._value(source), along % len(its.shape)
        if name == "slice" and its is not None:
            return "slice", self._value(source), *self._bounds(node, its)
        target: Any = node.target
        if name == "scaled_dot_product_attention" and its is not None:
            scale = node.kwargs.get("scale")
            scale = its.shape[-1] ** -0.5 if scale is None else scale
            node_kwargs = {**node.kwargs, "scale": scale}
            return str(target), self._given(node, node_kwargs)
        return str(target), self._given(node, node.kwargs)

    def _given(self, node: fx.Node, kwargs: Mapping[str, Any]) -> CallLine:
        """Every argument by its name, those left out at their defaults; devices and layouts are none of them."""
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        found: list[tuple[str, Any]] = []
        for place, argument in enumerate(target._schema.arguments):
            if argument.name in _PLACES:
                continue
            if argument.name in kwargs:
                value = kwargs[argument.name]
            elif place < len(node.args) and not argument.kwarg_only:
                value = node.args[place]
            else:
                value = argument.default_value
            found.append((argument.name, self._value(value)))
        return tuple(found)

    def _bounds(self, node: fx.Node, its: TensorType) -> tuple[int, int, int, int]:
        """Dim, start, end and step of a slice, within its dim."""
        dim = _argument(node, "dim", 1, 0) % len(its.shape)
        size = its.shape[dim]
        start, end = _argument(node, "start", 2), _argument(node, "end", 3)
        step = _argument(node, "step", 4, 1)
        return dim, *slice(start, end, step).indices(size)

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.names.get(value)
        if isinstance(value, list | tuple):
            return tuple(self._value(each) for each in value)
        if isinstance(value, bool | int | str | None | torch.dtype | torch.memory_format | torch.layout):
            return value
        if isinstance(value, float):
            return value if not math.isfinite(value) or value == 0 else float(f"{value:.{_DIGITS}g}")
        if isinstance(value, torch.device):
            return None
        self.unknown = self.unknown or f"{type(value).__name__} {value} has no canonical form"
        return None


def _name(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::")


def _argument(node: fx.Node, name: str, place: int, default: Any = None) -> Any:
    return node.kwargs.get(name, node.args[place] if place < len(node.args) else default)


def _settled(node: fx.Node) -> bool:
    """Whether a call that may draw random numbers draws none: its dropout, if any, is 0 or for training alone."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    given = {a.name: _argument(node, a.name, at, a.default_value) for at, a in enumerate(target._schema.arguments)}
    chances = [given[name] for name in ("dropout_p", "dropout", "p") if name in given]
    modes = [given[name] for name in ("train", "training") if name in given]
    return (bool(chances) and chances[0] == 0) or modes[:1] == [False]


def _idle(dropout: fx.Node) -> bool:
    return _argument(dropout, "train", 2) is False or bool(_argument(dropout, "p", 1) == 0)


def _mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _told(line: CallLine | None) -> str:
    """A line for people: the operator and the literals that it was given, with its result."""
    if line is None:
        return "nothing"
    if line[0] == "output":
        return "the output"
    shapes = ", ".join(str(list(each.shape)) for each in line[-1])
    return f"{line[0]}({', '.join(_literals(line[1:-1]))}) -> {shapes}"


def _literals(values: tuple[Any, ...]) -> Iterator[str]:
    for value in values:
        if isinstance(value, tuple) and value and value[0] == "@":
            yield f"@{value[1]}"
        elif isinstance(value, tuple) and value and value[0] == "constant":
            yield f"constant {value[-1][:8]}"
        elif isinstance(value, tuple) and value and value[0] in ("%", "part", "input"):
            yield str(value[1]) if value[0] == "input" else "%"
        elif isinstance(value, tuple):
            inner = list(_literals(value))
            named = len(value) == 2 and isinstance(value[0], str)
            yield f"{value[0]}={inner[1]}" if named and len(inner) == 2 else f"[{', '.join(inner)}]"
        else:
            yield str(value)
