"""Program: the exported FX graph seen as typed values over named tensors, with no weights inside.

A Program is never mutated: a rewrite returns a new one, so the old one is there to compare, print and blame.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from shear_ir.printer import plain

Shape = tuple[int, ...]
TensorKind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of one tensor; dims that vary with the input hold their size at trace time."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Param:
    """A tensor the model owns, by identity: tied weights are one Param with ``aliases``."""

    name: str
    kind: TensorKind
    type: TensorType
    aliases: tuple[str, ...] = ()
    persistent: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.type.shape:
            count *= size
        return count


@dataclass(frozen=True)
class ModuleInfo:
    """One entry of the module tree: its path from the root and the qualified name of its class."""

    path: str
    type: str


@dataclass(frozen=True, eq=False)
class Feed:
    """The inputs of a trace: ``values`` by forward-argument name, any nesting of tensors, small and on the CPU.

    ``dtype``: the floating-point type that the model had; inputs of that type follow the model into another.
    """

    values: Mapping[str, Any]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Held:
    """Why what a module computes stays whole; ``sizes``: dims of these sizes alone, where they are known."""

    reason: str
    sizes: frozenset[int] | None = None


class ModelSource:
    """The model that a program was traced from: whoever needs weights reads them here, while somebody wants it held.

    ``state``: what the model was like then, devices among it; a program is found again for a model in that state.
    """

    def __init__(self, model: nn.Module, state: object) -> None:
        self.model: nn.Module | None = model
        self.state = state

    def forget(self) -> None:
        """Let go of the model, as of one that is large and no longer wanted."""
        self.model = None


@dataclass(frozen=True, eq=False)
class Program:
    """A traced model.

    ``graph``: ATen calls over placeholders; each placeholder is a Param or an input. ``types``: node name to the
    types of its tensor results (one for a tensor, several for a tuple). ``params`` by canonical name, in graph order;
    ``of_placeholder`` maps a placeholder to its Param. ``constants`` holds the small tensors the trace lifted.
    ``caches``: whether the model keeps keys and values per generated token. ``dynamic``: whether batch and length
    stayed symbolic, so that the graph runs at other sizes; ``fixed``: inputs by name with the dims that did not,
    because the model's forward takes their size as a number. ``guards``: what forward asked of the sizes of its
    inputs on the way that was traced, as in ``x.shape[1] <= 8``; it may take another where one does not hold. ``feed``:
    the inputs that it was traced with. ``source``: the model itself, where there is one; a rewrite has none. ``held``:
    modules by path whose values stay whole, as where forward takes a way that was not traced.
    """

    graph: fx.Graph
    types: Mapping[str, tuple[TensorType, ...]]
    params: Mapping[str, Param]
    of_placeholder: Mapping[str, str]
    modules: Mapping[str, ModuleInfo]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    caches: bool = False
    dynamic: bool = False
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    owner: str = "model"
    feed: Feed | None = field(default=None, repr=False)
    held: Mapping[str, Held] = field(default_factory=dict)
    source: ModelSource | None = field(default=None, repr=False)

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node in order of execution."""
        return tuple(self.graph.nodes)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that the user feeds, as forward calls them; a node may be called otherwise."""
        return tuple(self.input_nodes)

    @cached_property
    def input_nodes(self) -> Mapping[str, fx.Node]:
        """The placeholder of each tensor that the user feeds, by the name that forward gives it."""
        fed = (n for n in self.nodes if n.op == "placeholder" and n.name not in self.of_placeholder)
        return {str(n.target): n for n in fed}

    @cached_property
    def input_types(self) -> Mapping[str, TensorType]:
        """The type of each tensor that the user feeds."""
        return {name: self.types[node.name][0] for name, node in self.input_nodes.items()}

    @cached_property
    def placeholder_of(self) -> Mapping[str, fx.Node]:
        """The placeholder of each Param, by the Param's name."""
        return {self.of_placeholder[n.name]: n for n in self.nodes if n.name in self.of_placeholder}

    def param(self, node: fx.Node) -> Param | None:
        """The Param behind a placeholder; None for any other node."""
        name = self.of_placeholder.get(node.name)
        return None if name is None else self.params[name]

    def type(self, node: fx.Node) -> TensorType | None:
        """The type of a node with one tensor result; None for any other node."""
        types = self.types.get(node.name, ())
        return types[0] if len(types) == 1 else None

    def calls(self) -> Iterator[fx.Node]:
        """The operator calls in order, without the ``getitem`` that only unpack them."""
        return (n for n in self.nodes if n.op == "call_function" and n.target is not operator.getitem)

    @cached_property
    def parameter_count(self) -> int:
        """Number of trainable-or-frozen parameters, tied ones counted once; buffers are not parameters."""
        return sum(p.numel for p in self.params.values() if p.kind == "parameter")

    @cached_property
    def digest(self) -> str:
        """Names and shapes of all tensors as a short hash: two models a plan can serve alike share it."""
        text = ";".join(
            f"{p.name}{p.type.shape}"
            for p in sorted(self.params.values(), key=lambda p: p.name)
            if p.kind != "constant"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return plain(self)


def holds(guard: str, inputs: Mapping[str, Tensor]) -> bool:
    """Whether inputs by name are as a guard of a Program says."""
    names = {**SYMPY_INTERP, "math": math, "inf": math.inf}
    return bool(eval(guard, names, dict(inputs)))  # written by torch.export, out of sizes alone
