"""Copying an exported graph with its higher-order regions laid open.

``wrap_with_set_grad_enabled`` and ``wrap_with_autocast`` call a subgraph; here its operators are copied in line, so
that every later pass sees one flat graph. What a no-grad region returns is detached, which is the same function and
the same gradient. A region of any other kind stays a call, and the analysis treats it as a barrier.
Entries picked by constant consecutive numbers, as in ``qkv[:, :, [-2]]``, are copied as the slice that they are.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx

from shear_ir.program import TensorType
from shear_ir.verifier import types_of

# Checks that the exporter leaves behind; shapes are checked by the verifier, and pruning changes some of them.
_GUARDS = {"aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::sym_constrain_range",
           "aten::sym_constrain_range_for_size"}  # fmt: skip


_AS_IS = {torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.detach_.default}


class GraphCopier:
    """Copies the graph of ``source`` node by node; ``strip`` is the module-path prefix of the tracing wrapper."""

    def __init__(self, source: fx.GraphModule, strip: str) -> None:
        self.source = source
        self.strip = strip
        self.graph = fx.Graph()
        self.types: dict[str, tuple[TensorType, ...]] = {}
        self._env: dict[fx.Node, Any] = {}
        self._constants: dict[fx.Node, Tensor] = {}

    def placeholder(self, node: fx.Node, name: str, constant: Tensor | None = None) -> fx.Node:
        """Copy an input under a name of its own; ``constant``: its value, for one that never changes."""
        copy = self.graph.placeholder(name)
        if constant is not None:
            self._constants[copy] = constant
        self._keep(node, copy)
        return copy

    def reuse(self, node: fx.Node, copy: fx.Node) -> None:
        """Let a second input of a tied tensor be the first one."""
        self._env[node] = copy

    def body(self) -> None:
        """Copy everything that is not a placeholder and is read, or writes to what is."""
        self._region(self.source, inputs=None)
        # Such as the weights that attention hands out beside its result: a sum over heads that nobody sees.
        self.graph.eliminate_dead_code()
        live = {node.name for node in self.graph.nodes}
        self.types = {name: types for name, types in self.types.items() if name in live}
        self.graph.lint()

    def _region(self, owner: torch.nn.Module, inputs: tuple[Any, ...] | None) -> Any:
        graph = owner.graph
        assert isinstance(graph, fx.Graph)
        feeds = iter(inputs or ())
        for node in graph.nodes:
            if node.op == "placeholder":
                if inputs is not None:
                    self._env[node] = next(feeds)
            elif node.op == "output":
                if inputs is not None:
                    return fx.map_arg(node.args[0], self._env.__getitem__)
                self.graph.output(fx.map_arg(node.args[0], self._env.__getitem__))
            elif node.op == "get_attr":
                self._env[node] = getattr(owner, str(node.target))
            else:
                self._call(node)
        return None

    def _call(self, node: fx.Node) -> None:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _GUARDS:
            return
        args: tuple[Any, ...] = fx.map_arg(node.args, self._env.__getitem__)
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            enabled, region, *rest = args
            self._env[node] = self._results(self._region(region, tuple(rest)), detach=not enabled)
        elif name == "wrap_with_autocast":
            region, *rest = args[4:]
            self._env[node] = self._region(region, tuple(rest))
        elif node.target is operator.getitem and not isinstance(args[0], fx.Node):
            self._env[node] = args[0][args[1]]
        else:
            if any(isinstance(a, fx.GraphModule) for a in args):
                args = tuple(f"<region {name}>" if isinstance(a, fx.GraphModule) else a for a in args)
            kwargs = fx.map_arg(node.kwargs, self._env.__getitem__)
            target, args = self._sliced(node.target, args)
            if target is torch.ops.aten.view_as_complex.default:
                args = (self._packed(args[0]),)
            copy = self.graph.call_function(target, args, kwargs)
            self._keep(node, copy)
            if target in _AS_IS and args[0] in self._constants:
                self._constants[copy] = self._constants[args[0]]

    def _sliced(self, target: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """The same call, or a slice where the entries of one dim are picked by constant consecutive numbers."""
        if target is not torch.ops.aten.index.Tensor:
            return target, args
        picked = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
        constant = self._constants.get(picked[0][1]) if len(picked) == 1 else None
        if constant is None or constant.dim() != 1 or constant.dtype != torch.int64 or not constant.numel():
            return target, args
        numbers = constant.tolist()
        start, end = numbers[0], numbers[-1] + 1
        if numbers != list(range(start, end)) or start < 0 < end:
            return target, args
        return torch.ops.aten.slice.Tensor, (args[0], picked[0][0], start, end or sys.maxsize)

    def _packed(self, pairs: fx.Node) -> fx.Node:
        """``pairs`` in memory of their own: beside an odd number of others they could not be seen as complex."""
        copy = self.graph.call_function(torch.ops.aten.contiguous.default, (pairs,))
        copy.meta = dict(pairs.meta)
        self.types[copy.name] = self.types[pairs.name]
        return copy

    def _results(self, results: Any, detach: bool) -> Any:
        if not detach:
            return results
        detached = []
        for value in results:
            copy = value
            if isinstance(value, fx.Node) and self.types.get(value.name) and self._floats(value):
                copy = self.graph.call_function(torch.ops.aten.detach.default, (value,))
                copy.meta = dict(value.meta)
                self.types[copy.name] = self.types[value.name]
            detached.append(copy)
        return detached

    def _floats(self, value: fx.Node) -> bool:
        return all(t.dtype.is_floating_point for t in self.types[value.name])

    def _keep(self, node: fx.Node, copy: fx.Node) -> None:
        self._env[node] = copy
        self.types[copy.name] = types_of(node.meta.get("val"))
        stack = node.meta.get("nn_module_stack") or {}
        copy.meta["nn_module_stack"] = {
            key: (path.removeprefix(self.strip).lstrip("."), kind)
            for key, (path, kind) in stack.items()
            if path and not path.startswith("_empty")  # a module that the exporter made up for its own nodes
        }
        copy.meta["stack_trace"] = node.meta.get("stack_trace", "")
