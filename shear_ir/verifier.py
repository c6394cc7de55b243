"""Invariants of a Program, checked after every rewrite: it is well formed and its types are what its calls compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from shear_ir.errors import InvalidProgram
from shear_ir.program import Program, TensorType


class MetaInterpreter(fx.Interpreter):
    """Runs a graph on the meta device and keeps the types of what each call makes.

    A call like an earlier one, as most calls of a deep model are, has the earlier one's result.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.types: dict[str, tuple[TensorType, ...]] = {}
        self._known: dict[Any, Any] = {}
        self._writes = any(_mutable(node.target) for node in graph.nodes)

    def run_node(self, n: fx.Node) -> Any:
        """Run one call with every device replaced by meta."""
        result = super().run_node(n)
        if n.op != "output":
            self.types[n.name] = types_of(result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As the interpreter does, on the meta device."""
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        args = tuple(torch.device("meta") if isinstance(a, torch.device) else a for a in args)
        if self._writes:  # shared results would be written to more than once
            return super().call_function(target, args, kwargs)
        call = (target, _likeness(args), _likeness(tuple(kwargs.items())))
        if call not in self._known:
            self._known[call] = super().call_function(target, args, kwargs)
        return self._known[call]


def _mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _likeness(value: Any) -> Any:
    """What two arguments have in common when no call on the meta device can tell them apart."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_likeness(item) for item in value])
    return type(value), value


def types_of(result: Any) -> tuple[TensorType, ...]:
    """The types of the tensors in a call's result: one for a tensor, several for a sequence, none otherwise."""
    if isinstance(result, Tensor):
        return (TensorType(tuple(int(s) for s in result.shape), result.dtype),)
    if isinstance(result, (tuple, list)):
        return tuple(t for item in result for t in types_of(item))
    return ()


def infer_types(
    graph: fx.Graph, placeholders: Mapping[str, TensorType], blame: str = "trace"
) -> dict[str, tuple[TensorType, ...]]:
    """The types of all nodes, computed by running the graph on the meta device; linear in the number of nodes."""
    interpreter = MetaInterpreter(graph)
    inputs = [
        torch.empty(placeholders[n.name].shape, dtype=placeholders[n.name].dtype, device="meta")
        for n in graph.nodes
        if n.op == "placeholder"
    ]
    try:
        with torch.no_grad():
            interpreter.run(*inputs, enable_io_processing=False)
    except Exception as failure:
        raise InvalidProgram(f"{blame} left a program that does not run: {failure}") from failure
    return interpreter.types


def verify_program(program: Program, blame: str = "a pass") -> None:
    """Raise ``InvalidProgram``, naming ``blame``, unless every invariant of the program holds."""
    try:
        program.graph.lint()
    except RuntimeError as failure:
        raise InvalidProgram(f"{blame} left a malformed graph: {failure}") from failure
    types = {}
    for node in program.nodes:
        if node.op != "placeholder":
            continue
        param = program.param(node)
        known = program.type(node)
        if known is None:
            raise InvalidProgram(f"{blame} left the placeholder {node.name} without a type")
        if param is not None and param.type != known:
            raise InvalidProgram(f"{blame} left {param.name} as {param.type} and its placeholder as {known}")
        types[node.name] = known
    for name, found in infer_types(program.graph, types, blame).items():
        if found != program.types.get(name, ()):
            raise InvalidProgram(f"{blame} typed %{name} as {program.types.get(name)}, but it computes {found}")
