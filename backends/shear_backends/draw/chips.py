"""A dim as coloured cells: factors of a product above each other, parts of a concat beside each other.

    kv0:2 * q0:3 * (r:4 | r:4)      [    kv0 2    ]
                                    [    q0 3     ]
                                    [ r 4 ][ r 4  ]

Widths follow sizes. Under a plan every cell of a group that is cut has a bar that shows in red which share goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from xml.sax.saxutils import escape

import numpy as np

from shear_backends.draw.palette import DIMMED, FROZEN_INK, RED, Palette, darker, ink
from shear_ir.axes import Axis, Concat, Dim, Product, resolve
from shear_ir.plans import Cut, intervals
from shear_passes.analysis.find_groups import Group, Groups

HEIGHT = 15
LEAST = 36
_MARKS = 24
"""Up to so many units each has its own mark in the bar of a plan; above, the bar shows shares."""


@dataclass(frozen=True)
class Chips:
    """Draws dims. ``cuts``: group name to its cut; ``alike``: axis to the axes of later blocks that it stands for."""

    groups: Groups
    palette: Palette
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    alike: Mapping[Axis, Sequence[Axis]] = field(default_factory=dict)

    def cell(self, dim: Dim) -> str:
        """One ``<TD>`` for a dim."""
        dim = resolve(dim)
        return self._cell(dim, self._least(dim))

    def text(self, dim: Dim) -> str:
        """What a cell says: ``ffn0 96``, under a plan ``ffn0 96→77``; only the size where no other tensor shares it."""
        if not isinstance(dim, Axis):
            return str(dim.size)
        group = self.groups.by_axis.get(dim)
        name = group.name + " " if group and not _lonely(group) else ""
        left = self.left(dim)
        return f"{name}{dim.size}" + (f" → {left}" if left != str(dim.size) else "")

    def left(self, atom: Axis) -> str:
        """How many units stay, as a range where the blocks folded into one differ."""
        low, high = min(self._counts(atom)), max(self._counts(atom))
        return str(low) if low == high else f"{low}–{high}"

    def _counts(self, atom: Axis) -> list[int]:
        return [atom.size if cut is None else len(cut.kept) for cut in self._cuts(atom)]

    def _cuts(self, atom: Axis) -> list[Cut | None]:
        owners = [self.groups.by_axis.get(one) for one in self.alike.get(atom, [atom])]
        return [self.cuts.get(group.name) if group else None for group in owners]

    def _same(self, cut: Cut, atom: Axis) -> bool:
        """Whether all blocks that the drawn one stands for lose the very same units."""
        return all(other is not None and np.array_equal(other.kept, cut.kept) for other in self._cuts(atom))

    def _least(self, dim: Dim) -> int:
        """The width that the text of every cell needs, in points."""
        if isinstance(dim, Product) and dim.factors:
            return max(self._least(f) for f in dim.factors)
        if isinstance(dim, Concat):
            return sum(self._least(p) + 1 for p in _merged(dim)) - 1
        text = self.text(dim)
        return max(LEAST if " " in text else 8, 9 + round(5.1 * len(text)))

    def _cell(self, dim: Dim, width: int) -> str:
        if isinstance(dim, Concat):
            parts = _merged(dim)
            widths = _shared(width - len(parts) + 1, [p.size for p in parts], [self._least(p) for p in parts])
            return _table("<TR>" + "".join(self._cell(p, w) for p, w in zip(parts, widths, strict=True)) + "</TR>")
        if isinstance(dim, Product) and dim.factors:
            return _table("".join(f"<TR>{self._cell(f, width)}</TR>" for f in dim.factors))
        group = self.groups.by_axis.get(dim) if isinstance(dim, Axis) else None
        return self._atom(self.text(dim), group, width)

    def _atom(self, text: str, group: Group | None, width: int) -> str:
        fill = self.palette.fill(group) if group else DIMMED
        font = f'<FONT POINT-SIZE="9" COLOR="{ink(fill)}">{escape(text)}</FONT>' if text else ""
        colours = f'BGCOLOR="{fill}" WIDTH="{width}" HEIGHT="{HEIGHT}"{tooltip(self._about(group))}'
        cut = self.cuts.get(group.name) if group else None
        if cut is None or group is None or not len(cut.removed) or fill == DIMMED:
            return f"<TD {colours}>{font}</TD>"
        bar = self._bar(cut, group.axis, width, darker(fill, 0.25))
        return (
            f'<TD {colours}><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">'
            f'<TR><TD WIDTH="{width}" HEIGHT="{HEIGHT - 2}">{font}</TD></TR><TR>{bar}</TR></TABLE></TD>'
        )

    def _bar(self, cut: Cut, atom: Axis, width: int, fill: str) -> str:
        """One row of cells: a mark for each unit, or for many units, or many blocks, the share that stays and goes."""
        counts = self._counts(atom)
        if cut.size <= _MARKS and self._same(cut, atom):
            stays = np.isin(np.arange(cut.size), cut.kept)
            edges = [0, *(np.flatnonzero(np.diff(stays)) + 1).tolist(), cut.size]
            spans = [(bool(stays[a]), float(b - a)) for a, b in pairwise(edges)]
        else:
            mean = sum(counts) / len(counts)
            spans = [(True, mean), (False, cut.size - mean)]
        cells = "".join(
            f'<TD BGCOLOR="{fill if stay else RED}" WIDTH="{max(1, round(width * count / cut.size))}" HEIGHT="4"></TD>'
            for stay, count in spans
            if count
        )
        return f'<TD><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR>{cells}</TR></TABLE></TD>'

    def _about(self, group: Group | None) -> str:
        if group is None:
            return ""
        cut = self.cuts.get(group.name)
        lines = [f"{group.name}: {group.kind}, {group.size} units"]
        if group.reason:
            lines.append(f"frozen: {group.reason}")
        if cut is not None and len(cut.removed):
            same = f", {len(cut.removed)} go: {_spans(cut)}"
            which = same if self._same(cut, group.axis) else "; which ones differs from block to block"
            lines.append(f"{self.left(group.axis)} stay{which}")
        return "\n".join(lines)


def tooltip(text: str) -> str:
    """Attributes that give a cell a tooltip; graphviz makes one only where there is a link, which render takes out."""
    return f' HREF="#" TITLE="{escape(text, {chr(34): "&quot;", chr(10): "&#10;"})}"' if text else ""


def grey(text: str, size: int = 9) -> str:
    """Small print."""
    return f'<FONT POINT-SIZE="{size}" COLOR="{FROZEN_INK}">{text}</FONT>' if text else ""


def _table(rows: str) -> str:
    return f'<TD><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="1" CELLPADDING="0">{rows}</TABLE></TD>'


def _lonely(group: Group) -> bool:
    """A frozen axis that no other tensor shares and no vocabulary names: kernel positions and the like."""
    return not group.prunable and len(group.slices) == 1 and group.kind != "vocab"


def _merged(dim: Concat) -> list[Dim]:
    """The parts with neighbours of size 1 taken together: what they hold can never go."""
    parts: list[Dim] = []
    for single, run in groupby(dim.parts, lambda part: part.size == 1):
        found = list(run)
        parts.extend([Axis(len(found))] if single and len(found) > 1 else found)
    return parts


def _shared(width: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """``width`` shared out in proportion to sizes, to nobody less than the least."""
    free = width - sum(least)
    want = [max(0.0, width * size / sum(sizes) - low) for size, low in zip(sizes, least, strict=True)]
    total = sum(want) or 1.0
    return [low + int(free * w / total) for low, w in zip(least, want, strict=True)]


def _spans(cut: Cut) -> str:
    spans = [f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in intervals(cut.removed)]
    return ", ".join(spans[:12]) + (f" and {len(spans) - 12} more spans" if len(spans) > 12 else "")
