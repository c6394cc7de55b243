"""The graph backend: a Program and its tensors as an ``fx.GraphModule`` that runs and trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from shear_ir.program import Program


def graph_module(program: Program, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """``program`` as a module whose parameters keep their names; ``tensors`` by name, cut as the program says.

    It takes the program's inputs by name or position and returns a tuple of tensors. A program traced with
    ``dynamic=True`` runs at any batch size and length.
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
    return fx.GraphModule(root, graph, class_name=f"Sheared{program.owner}")


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
