"""The graph backend: a Program and its tensors as an ``fx.GraphModule`` that runs and trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from shear_ir.errors import ShearingError
from shear_ir.program import Program


def graph_module(program: Program, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """``program`` as a module whose parameters keep their names; ``tensors`` by name, cut as the program says.

    It takes the program's inputs by name or position and returns a tuple of tensors. A program traced with
    ``dynamic=True`` runs at any batch size and length, except where the model's own forward fixes one: then other
    sizes raise ``ShearingError``.
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
            copies[node] = graph.get_attr(_register(root, program, name, tensors))
        elif node not in copies and node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    module = fx.GraphModule(root, graph, class_name=f"Sheared{program.owner}")
    module.register_forward_pre_hook(_Sizes.of(program), with_kwargs=True)
    return module


@dataclass(frozen=True)
class _Sizes:
    """Refuses inputs of other sizes than those that the trace has fixed."""

    names: tuple[str, ...]
    fixed: dict[str, dict[int, int]]
    guard: Callable[..., object] | None = None

    @classmethod
    def of(cls, program: Program) -> _Sizes:
        """The sizes that are fixed in the graph of ``program``."""
        shapes = {name: program.types[name][0].shape for name in program.inputs}
        fixed = {n: {d: shapes[n][d] for d in dims} for n, dims in program.fixed.items()}
        return cls(program.inputs, fixed, program.guard)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict((*zip(self.names, args, strict=False), *kwargs.items()))
        for name, value in given.items():
            for dim, size in self.fixed.get(name, {}).items():
                if value.shape[dim] != size:
                    raise ShearingError(
                        f"{name} has size {value.shape[dim]} in dim {dim}, but the graph runs at {size} alone, "
                        "the size it was traced with: use the module backend, or trace with inputs of that size"
                    )
        if self.guard is None or any(name not in given for name in self.names):
            return
        try:
            self.guard(*(given[name] for name in self.names))
        except AssertionError as failure:
            shapes = ", ".join(f"{name} {tuple(given[name].shape)}" for name in self.names)
            raise ShearingError(
                f"at these sizes ({shapes}) the model takes another way than the one that was traced "
                f"({str(failure).splitlines()[0]}): use the module backend, or trace with inputs of such sizes"
            ) from failure


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``model`` by name, tied ones under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


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
