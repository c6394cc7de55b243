"""Which calls are drawn: parts of a box whose parameter they apply, or operators of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from shear_backends.draw.boxes import Boxes
from shear_backends.draw.model import Item, Op, OpKind
from shear_ir.axes import Dims, atoms
from shear_ir.nodes import module_path, source_line
from shear_ir.paths import inside
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Groups
from shear_passes.ops.registry import op_name

Sources = frozenset[str]

CROWD = 12
"""A module with more operators to draw is a loop laid open, such as a scan: it is drawn without them."""

_JOINS: Mapping[str, OpKind] = {"add": "add", "add_": "add", "sub": "add", "mul": "mul", "mul_": "mul"}
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
_SIGNS: Mapping[OpKind, str] = {"add": "+", "mul": "×", "attention": "attention", "output": "output"}


@dataclass(frozen=True)
class _Value:
    """``sources``: the items a value comes from; ``fixed``: it needs no input; ``learned``: a parameter went in."""

    sources: Sources = frozenset()
    fixed: bool = True
    learned: bool = False


class Decisions:
    """``of_node``: call to the item it is part of: the box of a parameter it applies, or an operator of its own.

    ``follows``: call to the operands whose origins it hands on: not those that only say which entries to pick or what
    shape to take. ``ops``: module to what is drawn of its own calls; ``plain``: modules to draw without.
    """

    def __init__(self, program: Program, groups: Groups, boxes: Boxes, plain: frozenset[str] = frozenset()) -> None:
        self.program, self.groups, self.boxes, self.plain = program, groups, boxes, plain
        self.of_node: dict[str, Item] = {}
        self.follows: dict[str, list[fx.Node]] = {}
        self._values: dict[str, _Value] = {}
        self.ops: dict[str, dict[str, Op]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._products = {c.node.name for c in groups.axes.contractions if len(c.operands) == 2}
        for node in program.nodes:
            self._values[node.name] = self._value(node)

    def _value(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return _Value() if self.program.param(node) else self._own(node, "input")
        operands = self.follows[node.name] = _read_for_values(node)
        read = [self._read(o, node) for o in operands]
        learned = any(v.learned for v in read)
        if node.op == "output" or node.name in self.groups.axes.barriers:
            return self._own(node, "output" if node.op == "output" else "barrier", learned)
        active = [v for v in read if not v.fixed]
        fixed = frozenset[str]().union(*(v.sources for v in read if v.fixed))
        if not active:
            return _Value(fixed, True, learned)
        box = self._applied(node)
        if box is not None:
            self.of_node[node.name] = self.boxes.by_path[box]
            return _Value(frozenset([box]), False, True)
        kind = self._kind(node, [v for v in read if v.learned or not v.fixed])
        if kind is not None:
            return self._own(node, kind, learned)
        self.follows[node.name] = self._picked_from(operands, read)
        sources = (self._read(o, node).sources for o in self.follows[node.name])
        return _Value(frozenset[str]().union(*sources), False, learned)

    def _picked_from(self, operands: list[fx.Node], read: list[_Value]) -> list[fx.Node]:
        """The operands without indices and masks, where there are learned numbers to apply them to."""
        numbers = [o for o in operands if (t := self.program.type(o)) and t.dtype.is_floating_point]
        learned = {o for o, v in zip(operands, read, strict=True) if v.learned}
        return numbers if learned & set(numbers) else operands

    def _read(self, node: fx.Node, reader: fx.Node) -> _Value:
        path = self.boxes.of_read(node, reader)
        return self._values[node.name] if path is None else _Value(frozenset([path]), True, self._holds(path))

    def _holds(self, path: str) -> bool:
        return self.boxes.by_path[path].owned

    def _applied(self, node: fx.Node) -> str | None:
        """The box of the parameter that a call applies: the largest of those that lie in the calling module.

        A module may read a tensor of a module inside of it, but what that module made of its tensors is a value.
        """
        place, found = module_path(node), set[str]()
        for operand in node.all_input_nodes:
            path = self.boxes.of_read(operand, node)
            if path is not None and inside(path, place):
                found.add(path)
            elif self._values[operand.name].fixed:
                found |= {p for p in self._values[operand.name].sources if self.boxes.by_path[p].within(place)}
        held = [path for path in found if self._holds(path)]
        return max(held, key=lambda path: (self.boxes.by_path[path].numel, path), default=None)

    def _kind(self, node: fx.Node, terms: list[_Value]) -> OpKind | None:
        name = _short(node)
        if module_path(node) in self.plain:
            return None
        learned = sum(v.learned for v in terms)
        if node.name in self._products and learned > 1:
            return "attention" if "attention" in name else "product"
        if name in _NORMS:
            return "norm"
        join = _JOINS.get(name)
        if join is None or len(terms) != 2 or terms[0].sources == terms[1].sources:
            return None
        # An input may be one term of a sum, as in x + f(x), but a mask that broadcasts says nothing.
        return join if learned == 2 or (learned == 1 and join == "add" and self._same_shape(node)) else None

    def _same_shape(self, node: fx.Node) -> bool:
        return len({t.shape for o in node.all_input_nodes if (t := self.program.type(o)) is not None}) == 1

    def _own(self, node: fx.Node, kind: OpKind, learned: bool = False) -> _Value:
        module, label = module_path(node), self._label(node, kind)
        call = next(reversed(node.meta.get("nn_module_stack") or ("",)))  # a module's second call has a key of its own
        self._counts[call, label] += 1
        # One barrier stands for all calls of its operator in the module.
        path = f"{module}#{label}" + ("" if kind == "barrier" else str(self._counts[call, label]))
        ops = self.ops.setdefault(module, {})
        self.of_node[node.name] = ops.setdefault(path, Op(path, module, kind, label, self._tooltip(node)))
        return _Value(frozenset([path]), False, learned)

    def _label(self, node: fx.Node, kind: OpKind) -> str:
        if kind in ("input", "barrier"):
            return node.name if kind == "input" else op_name(node)
        return "−" if _short(node) == "sub" else _SIGNS.get(kind, _short(node))

    def _tooltip(self, node: fx.Node) -> str:
        results = self.groups.axes.of_node.get(node.name, [])
        dims = "; ".join(shown(self.groups, one) for one in results)
        name = op_name(node) if node.op == "call_function" else node.op
        reason = self.groups.axes.barriers.get(node.name, "")
        lines = (f"barrier: {reason}" if reason else "", f"%{node.name} : {dims} = {name}", source_line(node))
        return "\n".join(str(line) for line in lines if line)


def shown(groups: Groups, dims: Dims) -> str:
    """Dims as text; of those that no parameter has, only the size."""
    return "[" + ", ".join(groups.show(d) if any(map(groups.label, atoms(d))) else str(d.size) for d in dims) + "]"


def _read_for_values(node: fx.Node) -> list[fx.Node]:
    """What a call reads, without tensors of which it takes only the shape or the type."""
    name = _short(node)
    count = 0 if name.endswith("_like") else 1 if name.endswith("_as") else None
    return node.all_input_nodes[:count]


def _short(node: fx.Node) -> str:
    """The operator without its library and its overload: ``layer_norm``."""
    parts = op_name(node).split(".")
    return parts[1] if len(parts) > 1 else parts[0]
