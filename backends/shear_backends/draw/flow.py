"""How data flows between what is drawn: the graph with everything else contracted, linear in the number of nodes.

A value hands on the items it comes from, and an item in between stands for all that came before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from shear_backends.draw.boxes import Boxes
from shear_backends.draw.decide import CROWD, Decisions, Sources, shown
from shear_backends.draw.model import Item, Line, Op
from shear_ir.axes import Axis, atoms
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Group, Groups


@dataclass
class Flow:
    """The items in the order in which data meets them, and the lines between them."""

    items: dict[str, Item] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)


def find_flow(program: Program, groups: Groups, boxes: Boxes, only: Group | None = None) -> Flow:
    """All boxes, the operators that matter and the lines; with ``only``, no more than carries that group's axis."""
    every = Boxes(program, groups) if only else boxes
    decided = Decisions(program, groups, every)
    crowded = frozenset(module for module, ops in decided.ops.items() if len(ops) > CROWD)
    if crowded:
        decided = Decisions(program, groups, every, crowded)
    flow = _without_dead_ends(_Lines(groups, boxes, decided, only).run(program), only is not None)
    if only:
        drawn = {(line.tail, line.head) for line in flow.lines}
        rest = _Lines(groups, boxes, decided, None, frozenset(flow.items)).run(program).lines
        flow.lines += [replace(line, hidden=True) for line in rest if (line.tail, line.head) not in drawn]
    return flow


class _Lines:
    """``only``: lines that carry this group's axis; ``among``: no operators but these."""

    def __init__(
        self, groups: Groups, boxes: Boxes, decided: Decisions, only: Group | None, among: Sources | None = None
    ) -> None:
        self.groups, self.boxes, self.decided, self.only, self.among = groups, boxes, decided, only, among
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
        for operand in self.decided.follows.get(node.name, ()):
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
        item = self.decided.of_node.get(node.name)
        if isinstance(item, Op):
            wanted = self.among is None or item.path in self.among
            return item if wanted and (incoming or self._carries(node)) else None
        return None if item is None else self.boxes.by_path.get(item.path)

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
        box = self.boxes.by_path.get(tail)
        mine = {a for row in box.rows for d in row.dims for a in atoms(d)} if box else set[Axis]()
        free = sorted((g for g in owners if g and g.prunable), key=lambda g: bool(mine) and g.axis not in mine)
        group = self.only or next(iter(free), None)
        return Line(tail, head, group, shown(self.groups, self.groups.axes.dims(value)))


def _without_dead_ends(flow: Flow, focused: bool) -> Flow:
    """Leave out operators that nothing drawn feeds or reads, and inputs of products that read other things too."""
    items = dict(flow.items)
    inputs = {path for path, item in items.items() if isinstance(item, Op) and item.kind == "input"}
    fed = {line.head for line in flow.lines if line.tail not in inputs}
    products = {path for path, item in items.items() if isinstance(item, Op) and item.kind in ("attention", "product")}
    boxes = {path for path, item in items.items() if not isinstance(item, Op)}
    lines = [line for line in flow.lines if line.tail not in inputs or line.head not in fed & products]
    while True:
        read, fed = {line.tail for line in lines}, {line.head for line in lines}
        ends = boxes | (fed & products) if focused else set()
        dead = {
            path for path, item in items.items() if path not in ends and not _alive(item, path in read, path in fed)
        }
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
