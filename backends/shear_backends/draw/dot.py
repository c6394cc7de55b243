"""A picture as graphviz source: clusters, boxes as tables, operators as small shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from shear_backends.draw.chips import Chips, grey, tooltip
from shear_backends.draw.legend import compact
from shear_backends.draw.model import Box, Cluster, Item, Line, Op, Row
from shear_backends.draw.palette import DARK, FROZEN_INK, LINE, RED, Palette
from shear_ir.plans import Plan

FONT = "Arial"
_OPS: Mapping[str, str] = {
    "add": 'shape=circle, width=0.24, fixedsize=true, fontsize=13, color="#8c8c8c", margin=0',
    "mul": 'shape=circle, width=0.24, fixedsize=true, fontsize=13, color="#8c8c8c", margin=0',
    "attention": 'shape=box, style="rounded,filled", height=0.28, fontsize=11, color="#5a5a5a", margin="0.12,0.03"',
    "product": 'shape=box, style="rounded,filled", height=0.26, fontsize=10, color="#5a5a5a", margin="0.1,0.02"',
    "norm": 'shape=box, style="rounded,filled", height=0.26, fontsize=10, color="#8c8c8c", margin="0.1,0.02"',
    "barrier": f'shape=octagon, style=filled, fillcolor="{RED}", color="{RED}", fontcolor=white, fontsize=10, '
    'height=0.3, margin="0.08,0.03"',
    "input": 'shape=box, style="rounded,filled", fillcolor="#f0f0f0", color="#c4c4c4", height=0.26, margin="0.1,0.02"',
    "output": 'shape=box, style="rounded,filled", fillcolor="#f0f0f0", color="#c4c4c4", height=0.26, margin="0.1,0.02"',
}


class Dot:
    """Writes one picture. ``members``: box path to the boxes it stands for, itself among them."""

    def __init__(
        self,
        chips: Chips,
        palette: Palette,
        titles: Callable[[str], tuple[str, str]],
        members: Mapping[str, Sequence[Box]],
        plan: Plan | None,
    ) -> None:
        self.chips, self.palette, self.titles, self.members, self.plan = chips, palette, titles, members, plan
        self._ids: dict[str, str] = {}
        self._reads: dict[str, list[str]] = {}
        self._readers: dict[str, list[str]] = {}

    def source(self, name: str, head: str, root: Cluster, lines: Sequence[Line]) -> str:
        """The text of the whole graph."""
        items = {item.path: item for item in root.items()}
        buffers = {path for path, item in items.items() if isinstance(item, Box) and not item.owned}
        streams = [line for line in lines if line.tail not in buffers]
        for line in streams:
            self._reads.setdefault(line.head, []).append(line.tail)
            self._readers.setdefault(line.tail, []).append(line.head)
        body = list(self._content(root, 1))
        weights = self._weights(items, streams)
        edges = [self._line(line, weights.get(line)) for line in lines]
        return "\n".join(
            [
                f"digraph {_quoted(name)} {{",
                f'  graph [fontname="{FONT}", fontsize=11, rankdir=TB, ranksep=0.28, nodesep=0.22, pad=0.25,'
                " bgcolor=white, labelloc=t, labeljust=l,",
                f"    label=<{head}>]",
                f'  node [fontname="{FONT}", fontsize=10, fontcolor="{DARK}", style=filled, fillcolor=white,'
                f' color="{LINE}", penwidth=0.8, margin="0.03,0.02"]',
                f'  edge [color="{LINE}", arrowsize=0.5, penwidth=1.1]',
                *body,
                *edges,
                "}\n",
            ]
        )

    def _content(self, cluster: Cluster, depth: int) -> Iterator[str]:
        pad = "  " * depth
        for part in cluster.content:
            if not isinstance(part, Cluster):
                yield pad + self._item(part)
                continue
            yield f"{pad}subgraph {_quoted('cluster_' + part.path)} {{"
            yield f"{pad}  graph [{self._frame(part, depth)}]"
            yield from self._content(part, depth + 1)
            yield pad + "}"
        yield from (pad + row for row in self._abreast(cluster))

    def _frame(self, cluster: Cluster, depth: int) -> str:
        klass = f"{cluster.times} {cluster.klass}".strip()
        label = f"<B>{escape(cluster.title)}</B>&#160; {grey(escape(klass), 10)}"
        look = f'color="{FROZEN_INK}", penwidth=1.6' if cluster.times else 'color="#c9c9c9", penwidth=0.8'
        style = "rounded,filled"
        if self.plan is not None and cluster.path in self.plan.gone:
            label += f'&#160; <FONT COLOR="{RED}"><B>gone</B></FONT>'
            look, style = f'color="{RED}", penwidth=1.6', "rounded,filled,dashed"
        fill = "#fafafa" if depth % 2 else "#ffffff"
        about = escape(f"{cluster.path} ({klass})")
        return f'label=<{label}>, style="{style}", fillcolor="{fill}", {look}, margin=9, tooltip="{about}"'

    def _item(self, item: Item) -> str:
        name = self._ids.setdefault(item.path, f"n{len(self._ids)}")
        if isinstance(item, Op):
            about = f", tooltip={_quoted(item.tooltip)}" if item.tooltip else ""
            return f"{name} [label={_quoted(item.label)}, {_OPS[item.kind]}{about}]"
        look = "" if item.owned else ', style="filled,dashed"'
        return f"{name} [shape=box, label=<{self._box(item)}>, tooltip={_quoted(item.path)}{look}]"

    def _box(self, box: Box) -> str:
        columns = 1 + max(len(row.dims) for row in box.rows)
        name, times = self.titles(box.path)
        klass = f"{times} {box.klass}".strip()
        head = f"<B>{escape(name)}</B>&#160; {grey(escape(klass))}&#160; {grey(self._count(box))}"
        columns_of = [self.chips.groups.show(d) for d in max(box.rows, key=lambda row: len(row.dims)).dims]
        rows = "".join(f"<TR>{self._row(row, columns_of)}</TR>" for row in box.rows)
        return (
            '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="1" CELLPADDING="1">'
            f'<TR><TD ALIGN="LEFT" COLSPAN="{columns}">{head}</TD></TR>{rows}</TABLE>'
        )

    def _row(self, row: Row, columns: Sequence[str]) -> str:
        names = ", ".join(row.names[:2]) + (f", +{len(row.names) - 2}" if len(row.names) > 2 else "")
        shape = " × ".join(str(size) for size in row.params[0].type.shape)
        text = f"{grey(escape(names))}" + (grey(f" = {escape(row.tied)}") if row.tied else "")
        dims = ", ".join(self.chips.groups.show(d) for d in row.dims)
        about = "\n".join([*(f"{p.name} [{dims}]" for p in row.params), shape])
        first = self.chips.groups.show(row.dims[0]) if row.dims else ""
        # A bias stands below the dim of the weight that it has.
        gap = columns.index(first) if first in columns and len(row.dims) == 1 else 0
        cells = "<TD></TD>" * gap + "".join(self.chips.cell(d) for d in row.dims)
        return f'<TD ALIGN="LEFT"{tooltip(about)}>{text}</TD>{cells}'

    def _count(self, box: Box) -> str:
        if not box.owned:
            return "buffer"
        if self.plan is None:
            return compact(box.numel)
        left = [sum(self._left(row) for row in one.rows) for one in self.members[box.path]]
        if set(left) == {box.numel}:
            return compact(box.numel)
        span = compact(left[0]) if len(set(left)) == 1 else f"{compact(min(left))}–{compact(max(left))}"
        return f'{compact(box.numel)} → <FONT COLOR="{RED}">{span}</FONT>'

    def _left(self, row: Row) -> int:
        assert self.plan is not None
        count = 0
        for param in row.params:
            if param.kind == "parameter":
                kept = self.plan.kept.get(param.name, {})
                left = 1
                for dim, size in enumerate(param.type.shape):
                    left *= len(kept[dim]) if dim in kept else size
                count += left
        return count

    def _abreast(self, cluster: Cluster) -> Iterator[str]:
        """Boxes of one module that read the same things stand side by side, in the model's order."""
        rows: dict[tuple[bool, frozenset[str]], list[str]] = {}
        for item in cluster.content:
            if isinstance(item, Box) and item.owned:
                reads = self._reads.get(item.path, [])
                around = frozenset(reads or self._readers.get(item.path, []))
                rows.setdefault((bool(reads), around), []).append(self._ids[item.path])
        for (_, around), found in rows.items():
            if around and len(found) > 1:
                yield f"{{ rank=same; {' -> '.join(found)} [style=invis] }}"

    def _weights(self, items: Mapping[str, Item], lines: Sequence[Line]) -> dict[Line, int]:
        """How straight lines want to be: the stream through the blocks very, what skips a block not at all."""
        order = {path: place for place, path in enumerate(items)}
        outs = Counter(line.tail for line in lines)

        def skips(line: Line) -> bool:
            head, reads = items[line.head], self._reads[line.head]
            joins = isinstance(head, Op) and head.kind in ("add", "mul") and len(reads) > 1
            return joins and outs[line.tail] > 1 and order[line.tail] == min(order[tail] for tail in reads)

        skipping = {line for line in lines if skips(line)}
        ahead = Counter(line.tail for line in lines if line not in skipping)
        into = Counter(line.head for line in lines if line not in skipping)
        straight = {line for line in lines if ahead[line.tail] == into[line.head] == 1}
        return {line: 1 if line in skipping else 8 if line in straight else 2 for line in lines}

    def _line(self, line: Line, weight: int | None) -> str:
        """A line with its axis as colour; one from a buffer (``weight`` None) has no say in where things stand."""
        if line.hidden:
            return f"  {self._ids[line.tail]} -> {self._ids[line.head]} [style=invis, weight={weight or 0}]"
        look = [f"tooltip={_quoted(line.dims)}"] if line.dims else []
        if line.group is not None and line.group.prunable:
            look.append(f'color="{self.palette.line(line.group)}"')
        if weight is None:
            look.append("constraint=false, style=dashed")
        elif weight != 1:
            look.append(f"weight={weight}")
        return f"  {self._ids[line.tail]} -> {self._ids[line.head]}" + (f" [{', '.join(look)}]" if look else "")


def _quoted(text: str) -> str:
    body = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "&#10;")
    return f'"{body}"'
