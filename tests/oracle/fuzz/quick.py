"""A Program without torch.export: the tracer under it, on real tensors, in a small part of the time and in the same operators.

Random programs by the thousand are traced so; a part of them by torch.export as well, and the two must agree.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from shear_backends.graph.module import named_tensors
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.regions import GraphCopier
from shear_ir.program import Param, Program, TensorType
from shear_passes.rewrite.raise_lora import raise_lora


def quick_trace(model: nn.Module, feed: Inputs) -> Program:
    """As ``shear_ir.trace`` for inputs of fixed sizes; nothing is known of modules."""
    named = {name: tensor for name, tensor in named_tensors(model).items() if tensor.is_floating_point()}

    def call(tensors: dict[str, Tensor], *inputs: Tensor) -> Any:
        result = functional_call(model, tensors, inputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    values = [value.clone() for value in feed.values()]
    # The tracer notes a fake tensor on every node, half of its time; the values themselves come below.
    with mock.patch.object(proxy_tensor, "set_meta", lambda proxy, value: proxy):
        made = make_fx(call, tracing_mode="real", pre_dispatch=True)(named, *values)
    _typed(made, [*named.values(), *(value.clone() for value in feed.values())])
    return raise_lora(_program(made, named, list(feed)))


class _Typing(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = result = super().run_node(n)
        return result


def _typed(made: fx.GraphModule, inputs: list[Tensor]) -> None:
    """Every node with the value that it has."""
    _Typing(made).run(*inputs, enable_io_processing=False)


def _program(made: fx.GraphModule, named: dict[str, Tensor], inputs: list[str]) -> Program:
    copier = GraphCopier(made, strip="")
    params: dict[str, Param] = {}
    of_placeholder: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    read = [n for n in made.graph.nodes if n.op == "placeholder"]
    for node, name in zip(read, (*named, *inputs), strict=True):
        if name not in named:
            copier.placeholder(node, name)
        elif node.users:
            copy = copier.placeholder(node, "p_" + name.replace(".", "_"))
            of_placeholder[copy.name] = name
            kind = TensorType(tuple(named[name].shape), named[name].dtype)
            params[name] = Param(name, "parameter" if isinstance(named[name], nn.Parameter) else "buffer", kind)
    for node in [n for n in made.graph.nodes if n.op == "get_attr"]:
        value = getattr(made, str(node.target))
        if isinstance(value, Tensor):
            name = f"lifted_tensor_{len(constants)}"
            with made.graph.inserting_before(read[0] if read else None):
                stands = made.graph.placeholder(f"c_{name}")
            stands.meta["val"] = value
            node.replace_all_uses_with(stands)
            made.graph.erase_node(node)
            copy = copier.placeholder(stands, f"c_{name}", value)
            constants[name], of_placeholder[copy.name] = value, name
            params[name] = Param(name, "constant", TensorType(tuple(value.shape), value.dtype))
    copier.body()
    return Program(copier.graph, copier.types, params, of_placeholder, {}, constants, owner="Program")
