"""Which operators are drawn and how data flows between what is drawn: the graph with everything else contracted.

Two walks, each linear in the number of nodes: the first decides which call belongs to which item, the second draws
lines. A value hands on the items it comes from, and an item in between stands for all that came before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from shear_backends.draw.boxes import Boxes
from shear_backends.draw.model import Item, Line, Op, OpKind, inside
from shear_ir.axes import Axis, atoms
from shear_ir.program import Program, module_path, source_line
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.rules.registry import op_name

Sources = frozenset[str]

_JOINS: Mapping[str, OpKind] = {"add": "add", "add_": "add", "sub": "add", "mul": "mul", "mul_": "mul"}
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
_SIGNS: Mapping[OpKind, str] = {"add": "+", "mul": "×", "attention": "attention", "output": "output"}


@dataclass
class Flow:
    """The items in the order in which data meets them, and the lines between them."""

    items: dict[str, Item] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class _Value:
    """``sources``: the items a value comes from; ``fixed``: it needs no input; ``learned``: a parameter went in."""

    sources: Sources = frozenset()
    fixed: bool = True
    learned: bool = False


def find_flow(program: Program, groups: Groups, boxes: Boxes, only: Group | None = None) -> Flow:
    """All boxes, the operators that matter and the lines; with ``only``, no more than carries that group's axis."""
    decided = _Decisions(program, groups, Boxes(program, groups) if only else boxes).of_node
    return _without_dead_ends(_Lines(groups, boxes, decided, only).run(program), only is not None)


class _Decisions:
    """``of_node``: call to the item it is part of: the box of a parameter it applies, or an operator of its own."""

    def __init__(self, program: Program, groups: Groups, boxes: Boxes) -> None:
        self.program, self.groups, self.boxes = program, groups, boxes
        self.of_node: dict[str, Item] = {}
        self._values: dict[str, _Value] = {}
        self._counts: Counter[str] = Counter()
        self._products = {c.node.name for c in groups.axes.contractions if len(c.operands) == 2}
        for node in program.nodes:
            self._values[node.name] = self._value(node)

    def _value(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return _Value() if self.program.param(node) else self._own(node, "input")
        read = [self._read(o, node) for o in node.all_input_nodes]
        learned = any(v.learned for v in read)
        if node.op == "output" or node.name in self.groups.axes.barriers:
            return self._own(node, "output" if node.op == "output" else "barrier", learned)
        active = [v for v in read if not v.fixed]
        fixed = frozenset[str]().union(*(v.sources for v in read if v.fixed))
        if not active:
            return _Value(fixed, True, learned)
        box = self._applied(node, fixed)
        if box is not None:
            self.of_node[node.name] = self.boxes.by_path[box]
            return _Value(frozenset([box]), False, True)
        kind = self._kind(node, active)
        if kind is not None:
            return self._own(node, kind, learned)
        return _Value(fixed.union(*(v.sources for v in active)), False, learned)

    def _read(self, node: fx.Node, reader: fx.Node) -> _Value:
        path = self.boxes.of_read(node, reader)
        return self._values[node.name] if path is None else _Value(frozenset([path]), True, self._holds(path))

    def _holds(self, path: str) -> bool:
        return self.boxes.by_path[path].owned

    def _applied(self, node: fx.Node, fixed: Sources) -> str | None:
        """The box of the parameter that a call applies: the largest of those that lie in the calling module."""
        found = [path for path in fixed if inside(path, module_path(node)) and self._holds(path)]
        return max(found, key=lambda path: (self.boxes.by_path[path].numel, path), default=None)

    def _kind(self, node: fx.Node, active: list[_Value]) -> OpKind | None:
        name = _short(node)
        learned = sum(v.learned for v in active)
        if node.name in self._products and learned > 1:
            return "attention" if "attention" in name else "product"
        if name in _NORMS:
            return "norm"
        join = _JOINS.get(name)
        if join is None or len(active) != 2 or active[0].sources == active[1].sources:
            return None
        # An input may be one term of a sum, as in x + f(x), but a mask that broadcasts says nothing.
        return join if learned == 2 or (learned == 1 and join == "add" and self._same_shape(node)) else None

    def _same_shape(self, node: fx.Node) -> bool:
        return len({t.shape for o in node.all_input_nodes if (t := self.program.type(o)) is not None}) == 1

    def _own(self, node: fx.Node, kind: OpKind, learned: bool = False) -> _Value:
        module = module_path(node)
        label = node.name if kind == "input" else _SIGNS.get(kind, _short(node))
        if kind == "barrier":
            label = op_name(node)
        if _short(node) == "sub":
            label = "−"
        op = Op(f"{module}#{self._counts[module]}", module, kind, label, self._tooltip(node))
        self._counts[module] += 1
        self.of_node[node.name] = op
        return _Value(frozenset([op.path]), False, learned)

    def _tooltip(self, node: fx.Node) -> str:
        results = self.groups.axes.of_node.get(node.name, [])
        shown = "; ".join("[" + ", ".join(self.groups.show(d) for d in dims) + "]" for dims in results)
        name = op_name(node) if node.op == "call_function" else node.op
        reason = self.groups.axes.barriers.get(node.name, "")
        lines = (f"barrier: {reason}" if reason else "", f"%{node.name} : {shown} = {name}", source_line(node))
        return "\n".join(line for line in lines if line)


class _Lines:
    def __init__(self, groups: Groups, boxes: Boxes, decided: Mapping[str, Item], only: Group | None) -> None:
        self.groups, self.boxes, self.only, self.decided = groups, boxes, only, decided
        self.sources: dict[str, Sources] = {}
        self.items: dict[str, Item] = {}
        self.found: dict[tuple[str, str], fx.Node] = {}

    def run(self, program: Program) -> Flow:
        for node in program.nodes:
            self.sources[node.name] = self._of(node)
        for path, box in self.boxes.by_path.items():
            self.items.setdefault(path, box)
        return Flow(self.items, [self._line(tail, head, value) for (tail, head), value in self.found.items()])

    def _of(self, node: fx.Node) -> Sources:
        incoming: dict[str, fx.Node] = {}
        for operand in node.all_input_nodes:
            for path in sorted(self._read(operand, node)):
                incoming.setdefault(path, operand)
                if path in self.boxes.by_path:
                    self.items.setdefault(path, self.boxes.by_path[path])
        item = self._drawn(node, incoming)
        if item is None:
            return frozenset(incoming)
        self.items.setdefault(item.path, item)
        for tail, value in incoming.items():
            if tail != item.path:
                self.found.setdefault((tail, item.path), value)
        return frozenset([item.path])

    def _drawn(self, node: fx.Node, incoming: Mapping[str, fx.Node]) -> Item | None:
        item = self.decided.get(node.name)
        if item is None or isinstance(item, Op):
            return item if self.only is None or incoming or self._carries(node) else None
        return self.boxes.by_path.get(item.path)

    def _read(self, node: fx.Node, reader: fx.Node) -> Sources:
        if not self._carries(node):
            return frozenset()
        path = self.boxes.of_read(node, reader)
        return self.sources[node.name] if path is None else frozenset([path])

    def _carries(self, node: fx.Node) -> bool:
        return self.only is None or self.only.axis in self._atoms(node)

    def _atoms(self, node: fx.Node) -> list[Axis]:
        return [a for dims in self.groups.axes.of_node.get(node.name, []) for d in dims for a in atoms(d)]

    def _line(self, tail: str, head: str, value: fx.Node) -> Line:
        owners = [self.groups.by_axis.get(a) for a in self._atoms(value)]
        group = self.only or next((g for g in owners if g and g.prunable), None)
        dims = ", ".join(self.groups.show(d) for d in self.groups.axes.dims(value))
        return Line(tail, head, group, f"[{dims}]" if dims else "")


def _short(node: fx.Node) -> str:
    """The operator without its library and its overload: ``layer_norm``."""
    parts = op_name(node).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _without_dead_ends(flow: Flow, focused: bool) -> Flow:
    """Leave out operators that nothing drawn feeds or reads, and inputs of products that read other things too."""
    items = dict(flow.items)
    inputs = {path for path, item in items.items() if isinstance(item, Op) and item.kind == "input"}
    fed = {line.head for line in flow.lines if line.tail not in inputs}
    products = {path for path, item in items.items() if isinstance(item, Op) and item.kind in ("attention", "product")}
    lines = [line for line in flow.lines if line.tail not in inputs or line.head not in fed & products]
    while True:
        read, fed = {line.tail for line in lines}, {line.head for line in lines}
        ends = fed & products if focused else set()
        dead = {path for path, item in items.items() if path not in ends and not _alive(item, path in read, path in fed)}
        if not dead:
            return Flow(items, lines)
        items = {path: item for path, item in items.items() if path not in dead}
        lines = [line for line in lines if line.tail in items and line.head in items]


def _alive(item: Item, read: bool, fed: bool) -> bool:
    if not isinstance(item, Op):
        return item.owned or read
    if item.kind == "barrier":
        return True
    return (read or item.kind == "output") and (fed or item.kind == "input")
