"""The text form of a Program: ``@`` parameter, ``%`` value named after its module path, one per line, with its type.

    @mlp.up.weight : f32[96, 64]    = param
    %mlp.up        : f32[2, 12, 96] = aten.linear(%norm, @mlp.up.weight)

``plain`` prints sizes alone; an analysis hands in ``Labels`` to print the names of axes, remarks and a table below.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from shear_ir.nodes import module_path

if TYPE_CHECKING:  # a Program prints itself
    from shear_ir.program import Param, Program, TensorType

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip

_KINDS = {"parameter": "param", "buffer": "buffer", "constant": "constant"}

# Where a result is kept says nothing about what it is.
_PLACEMENT = ("device", "layout", "pin_memory")
_END = 2**63 - 1

_WIDEST = 64
"""Columns align up to this width; a longer entry pushes only its own line."""


class Labels(Protocol):
    """What an analysis knows about a program and the printer does not."""

    def param_dims(self, param: Param) -> Sequence[str]:
        """Text of each dim of a parameter."""

    def value_dims(self, node: fx.Node, place: int) -> Sequence[str]:
        """Text of each dim of the tensor result number ``place`` of a call or an input."""

    def remark(self, node: fx.Node) -> str:
        """What to say behind a value; empty for nothing."""

    def footer(self, names: Mapping[str, str]) -> Sequence[str]:
        """Lines below the program; ``names`` has the printed name of each node."""


class PlainLabels:
    """Labels that know nothing: every dim is its size."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def param_dims(self, param: Param) -> Sequence[str]:
        """The sizes of a parameter."""
        return [str(size) for size in param.type.shape]

    def value_dims(self, node: fx.Node, place: int) -> Sequence[str]:
        """The sizes of a value."""
        return [str(size) for size in self.program.types[node.name][place].shape]

    def remark(self, node: fx.Node) -> str:
        """Nothing."""
        return ""

    def footer(self, names: Mapping[str, str]) -> Sequence[str]:
        """Nothing."""
        return ()


def plain(program: Program) -> str:
    """The program as text with plain sizes."""
    return render(program, PlainLabels(program))


def render(program: Program, labels: Labels) -> str:
    """The program as text with dims, remarks and footer from ``labels``; linear in the number of nodes."""
    names = value_names(program)
    rows = list(_rows(program, names, labels))
    named, typed = (max((len(row[i]) for row in rows if len(row[i]) <= _WIDEST), default=0) for i in (0, 1))
    lines = [f"{name:{named}} : {kind:{typed}} = {text}" for name, kind, text in rows]
    lines += [f"return {_argument(n.args[0], names).strip('[]')}" for n in program.nodes if n.op == "output"]
    footer = labels.footer(names)
    return "\n".join([*lines, "", *footer] if footer else lines)


def value_names(program: Program) -> dict[str, str]:
    """The printed name of each node: ``@`` and the name of a parameter, ``%`` and where a value is made.

    The value that a module's call ends with is named after the module, any other after its module and operator.
    """
    last = {call: node for node in program.nodes for call in node.meta.get("nn_module_stack") or ()}
    names: dict[str, str] = {}
    taken: dict[str, int] = {}
    for node in program.nodes:
        if node.op == "output":
            continue
        param = program.param(node)
        if param is not None:
            names[node.name] = f"@{param.name}"
            continue
        name = node.name if node.op == "placeholder" else _stem(program, node, last)
        unique = name
        while unique in taken:
            taken[name] += 1
            unique = f"{name}_{taken[name]}"
        taken[unique] = 0
        names[node.name] = f"%{unique}"
    return names


def op_text(node: fx.Node) -> str:
    """The operator as ``aten.linear``, without its overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._schema.name.partition('::')[2]}"
    return str(getattr(node.target, "__name__", node.target))


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype as ``f32``."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def numbers(members: Sequence[int]) -> str:
    """Sorted numbers as people write them: ``0–31``, ``0, 2, 4``, ``0, 2, …, 30``."""
    if len(members) > 1 and list(members) == list(range(members[0], members[-1] + 1)):
        return f"{members[0]}–{members[-1]}"
    if len(members) > 4:
        return f"{members[0]}, {members[1]}, …, {members[-1]}"
    return ", ".join(str(n) for n in members)


def _stem(program: Program, node: fx.Node, last: Mapping[str, fx.Node]) -> str:
    path = module_path(node)
    operation = op_text(node).rpartition(".")[2].strip("_")
    # torch.export says of some nodes that a module of its own made them.
    if not path or path not in program.modules:
        return operation
    innermost = list(node.meta["nn_module_stack"])[-1]
    return path if last[innermost] is node else f"{path}.{operation}"


def _rows(program: Program, names: Mapping[str, str], labels: Labels) -> Iterator[tuple[str, str, str]]:
    """Name, type and right-hand side of each line: inputs, then calls, each parameter before the first that reads it.

    Parameters that no call reads come first.
    """
    placeholders = [n for n in program.nodes if n.op == "placeholder"]
    printed = set()
    for node in placeholders:
        param = program.param(node)
        if param is None:
            yield names[node.name], _typed(program, node, labels), "input"
        elif not node.users:
            yield _param_row(param, labels)
    for node in program.nodes:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            param = program.param(source)
            if param is not None and param.name not in printed:
                printed.add(param.name)
                yield _param_row(param, labels)
        remark = labels.remark(node)
        yield names[node.name], _typed(program, node, labels), _call(node, names) + (f"  # {remark}" if remark else "")


def _param_row(param: Param, labels: Labels) -> tuple[str, str, str]:
    kind = _KINDS[param.kind] if param.persistent else f"{_KINDS[param.kind]}, not saved"
    tied = f"  # also {', '.join(param.aliases)}" if param.aliases else ""
    return f"@{param.name}", _tensor(param.type, labels.param_dims(param)), kind + tied


def _typed(program: Program, node: fx.Node, labels: Labels) -> str:
    types = program.types.get(node.name, ())
    texts = [_tensor(kind, labels.value_dims(node, place)) for place, kind in enumerate(types)]
    if not texts:
        return "size" if _makes_a_size(node) else "()"
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def _makes_a_size(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or op_text(node).startswith("aten.sym_")


def _tensor(kind: TensorType, dims: Sequence[str]) -> str:
    return f"{dtype_text(kind.dtype)}[{', '.join(dims)}]"


def _call(node: fx.Node, names: Mapping[str, str]) -> str:
    if node.target is operator.getitem:
        source, place = node.args
        return f"{_argument(source, names)}[{place}]"
    defaults = {}
    if isinstance(node.target, torch._ops.OpOverload):
        defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
    texts = [_argument(a, names) for a in node.args if not isinstance(a, torch.device)]
    for key, value in node.kwargs.items():
        if key not in _PLACEMENT and not (key in defaults and _same(value, defaults[key])):
            texts.append(f"{key}={_argument(value, names)}")
    return f"{op_text(node)}({', '.join(texts)})"


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, fx.Node) and type(value) is type(default) and bool(value == default)


def _argument(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value.name]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    return "end" if type(value) is int and value == _END else str(value).removeprefix("torch.")
