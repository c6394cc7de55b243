"""The graph backend: a Program and its tensors as an ``fx.GraphModule`` that runs and trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from shear_backends.graph.record import GraphRecord
from shear_ir.errors import ShearingError
from shear_ir.frontend.feeds import tensors_in
from shear_ir.program import Program, holds


def graph_module(program: Program, tensors: Mapping[str, Tensor]) -> ShearedGraph:
    """``program`` as a module whose parameters keep their names; ``tensors`` by name, cut as the program says.

    It takes the arguments that the program was traced with by name or position and returns a tuple of tensors. A
    program traced with ``dynamic=True`` runs at any batch size and length, except where the model's own forward fixes
    one: then other sizes raise ``ShearingError``.
    """
    root = nn.Module()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        if node.name in program.of_placeholder:
            continue
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    for node in program.nodes:
        name = program.of_placeholder.get(node.name)
        if name is not None and node.users:
            copies[node] = graph.get_attr(_register(root, program, name, _written(node, name, tensors)))
        elif node not in copies and node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return ShearedGraph.of(fx.GraphModule(root, graph, class_name=f"Sheared{program.owner}"), _Sizes.of(program))


class ShearedGraph(fx.GraphModule):
    """A graph that looks at its inputs before it runs; so do its copies, and what ``torch.load`` makes of it."""

    @classmethod
    def of(cls, module: nn.Module, sizes: _Sizes) -> ShearedGraph:
        """``module``, a graph module, with ``sizes`` as what its inputs have to be."""
        assert isinstance(module, fx.GraphModule)
        made = cls(module, module.graph, class_name=type(module).__name__)
        made.register_forward_pre_hook(sizes, with_kwargs=True)
        made.sizes = sizes
        return made

    sizes: _Sizes
    record: GraphRecord | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShearedGraph:
        made = super().__deepcopy__(memo)
        assert isinstance(made, ShearedGraph)
        made.register_forward_pre_hook(self.sizes, with_kwargs=True)
        made.sizes, made.record = self.sizes, self.record
        made.training = self.training
        return made

    def require_written(self) -> None:
        """Raise ``ShearingError`` for a graph that no file can hold."""
        if any(node.target is torch.ops.shear_ir.opaque.default for node in self.graph.nodes):
            raise ShearingError(
                "this graph calls modules that were not looked into, which no file holds: save the sheared modules"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        self.require_written()
        return _restored, (_tensors_alone(self), _rows(self.graph), type(self).__name__, self.sizes, self.training)


# torch's own way to save a graph traces its code anew, which operators that read sizes do not allow.
@dataclass(frozen=True)
class _Value:
    """The result of the node of this name, where a row reads it."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of torch by its name, as in ``aten.add.Tensor``."""

    name: str


_Row = tuple[str, Any, str, Any, Any]


def _rows(graph: fx.Graph) -> list[_Row]:
    """The nodes of ``graph`` in order: kind, target, name, arguments."""

    def named(value: Any) -> Any:
        return _Value(value.name) if isinstance(value, fx.Node) else _named(value)

    def plain(value: Any) -> Any:
        return fx.node.map_aggregate(value, named)

    return [(n.op, _named(n.target), n.name, plain(n.args), plain(n.kwargs)) for n in graph.nodes]


def _named(value: Any) -> Any:
    return _Operator(str(value)) if isinstance(value, torch._ops.OpOverload) else value


def _tensors_alone(module: nn.Module) -> nn.Module:
    """The tensors of ``module`` in a module that computes nothing."""
    alone = nn.Module()
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(alone)[name] = vars(module)[name]
    return alone


def _restored(root: nn.Module, rows: list[_Row], name: str, sizes: _Sizes, training: bool) -> ShearedGraph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def real(value: Any) -> Any:
        if isinstance(value, _Operator):
            return attrgetter(value.name)(torch.ops)
        return nodes[value.name] if isinstance(value, _Value) else value

    for op, target, own, args, kwargs in rows:
        args, kwargs = fx.node.map_aggregate(args, real), fx.node.map_aggregate(kwargs, real)
        nodes[own] = graph.create_node(op, real(target), args, kwargs, name=own)
    made = ShearedGraph.of(fx.GraphModule(root, graph, class_name=name), sizes)
    return made.train(training)


@dataclass(frozen=True)
class _Sizes:
    """Refuses inputs of other sizes than those that the trace has fixed; lays nested ones out as the graph has them.

    ``arguments``: names of forward's arguments in order; ``names``: those of the graph, one for each tensor.
    """

    arguments: tuple[str, ...]
    names: tuple[str, ...]
    fixed: dict[str, dict[int, int]]
    guards: tuple[str, ...] = ()

    @classmethod
    def of(cls, program: Program) -> _Sizes:
        """The sizes that are fixed in the graph of ``program``."""
        types = program.input_types
        fixed = {n: {d: types[n].shape[d] for d in dims} for n, dims in program.fixed.items()}
        arguments = program.inputs if program.feed is None else tuple(program.feed.values)
        return cls(arguments, program.inputs, fixed, program.guards)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        given = tensors_in(self._by_name(args, kwargs))
        if tuple(given) != self.names:
            raise ShearingError(
                f"the graph takes {', '.join(self.names)}, but was given {', '.join(given) or 'nothing'}"
            )
        self._check(given)
        return tuple(given.values()), {}

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        unknown = next((name for name in kwargs if name not in (*self.arguments, *self.names)), None)
        if unknown is not None:
            raise ShearingError(f"the graph takes {', '.join(self.arguments)}, but was given {unknown}")
        if len(args) > len(self.arguments):  # the last one takes as many as there are
            args = (*args[: len(self.arguments) - 1], args[len(self.arguments) - 1 :])
        named = dict(zip(self.arguments, args, strict=False)) | kwargs
        return {name: named[name] for name in (*self.arguments, *self.names) if name in named}

    def _check(self, given: Mapping[str, Tensor]) -> None:
        for name, value in given.items():
            for dim, size in self.fixed.get(name, {}).items():
                if value.shape[dim] != size:
                    raise ShearingError(
                        f"{name} has size {value.shape[dim]} in dim {dim}, but the graph runs at {size} alone, "
                        "the size it was traced with: use the module backend, or trace with inputs of that size"
                    )
        broken = next((guard for guard in self.guards if not holds(guard, given)), None)
        if broken is not None:
            shapes = ", ".join(f"{name} {tuple(given[name].shape)}" for name in self.names)
            raise ShearingError(
                f"at these sizes ({shapes}) the model takes another way than the one that was traced, for which "
                f"{broken}: use the module backend, or trace with inputs of such sizes"
            )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``model`` by name, tied ones under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _written(node: fx.Node, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``tensors``; one that the graph writes to is a copy, so that its owner's stays as it is."""
    writes = any(isinstance(u.target, torch._ops.OpOverload) and u.target._schema.is_mutable for u in node.users)
    if not writes or name not in tensors or isinstance(tensors[name], nn.Parameter):
        return tensors
    return {**tensors, name: tensors[name].detach().clone()}


def _register(root: nn.Module, program: Program, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Put the tensor at its dotted name under ``root``; constants go under ``constants``."""
    param = program.params[name]
    tensor = tensors[name] if name in tensors else program.constants[name]
    path = name if param.kind != "constant" else f"constants.{name.replace('.', '_')}"
    *parents, leaf = path.split(".")
    owner = root
    for part in parents:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        return path
    if param.kind == "parameter":
        owner.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    else:
        owner.register_buffer(leaf, tensor, persistent=param.persistent and param.kind == "buffer")
    return path
