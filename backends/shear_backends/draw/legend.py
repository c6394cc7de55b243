"""The head of a picture: what model it is, and its groups as a table in which likes share a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from shear_backends.draw.chips import grey, tooltip
from shear_backends.draw.palette import DARK, RED, Palette
from shear_ir.plans import Cut, Plan
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Group, Groups

_REASON = 64


@dataclass(frozen=True)
class LegendEntry:
    """Groups of one kind that share a row: same size and cost when prunable, same reason when frozen."""

    groups: tuple[Group, ...]

    @property
    def names(self) -> str:
        """``ffn0–ffn31``; at most three spans."""
        spans = list(_spans([g.name for g in self.groups]))
        return ", ".join(spans[:3]) + (f", +{len(spans) - 3}" if len(spans) > 3 else "")

    @property
    def state(self) -> str:
        """``prunable``, or why not, short."""
        reason = _plain(self.groups[0].reason)
        return f"frozen: {_shortened(reason, _REASON)}" if reason else "prunable"

    @property
    def total(self) -> int:
        """Parameters in which the groups occur."""
        return sum(g.size * g.parameters_per_unit for g in self.groups)


def entries(groups: Iterable[Group]) -> list[LegendEntry]:
    """The rows of the legend: what can go first, in graph order."""
    found: dict[object, list[Group]] = {}
    for group in groups:
        like = (group.size, group.parameters_per_unit) if group.prunable else _plain(group.reason)
        found.setdefault((not group.prunable, group.kind, like), []).append(group)
    rows = [LegendEntry(tuple(alike)) for alike in found.values()]
    return sorted(rows, key=lambda entry: not entry.groups[0].prunable)


def header(
    program: Program, groups: Groups, only: Group | None, palette: Palette, plan: Plan | None, barriers: int
) -> str:
    """The HTML-like label of the graph: title, what is removed, legend of the groups that have parameters."""
    cuts = {c.group: c for c in plan.cuts} if plan else {}
    drawn = (g for g in groups if any(program.params[name].kind == "parameter" for name in g.parameters))
    rows = entries([only] if only else drawn)
    columns = ["", "groups", "kind", "units", "parameters per unit", "total", *(["stay"] if plan else []), ""]
    across = f'ALIGN="LEFT" COLSPAN="{len(columns)}"'
    summary = _summary(program, only, plan)
    # As wide as the title, so that graphviz has no spare width to put between the columns.
    spare = 12 * len(program.owner) + 7 * len(re.sub("<[^>]*>", "", summary)) - 300
    lines = [
        f'<TR><TD {across}><FONT POINT-SIZE="20"><B>{escape(program.owner)}</B></FONT>&#160;&#160; {summary}</TD></TR>',
        "<TR>" + "".join(_aligned(grey(text), text in _RIGHT) for text in columns[:-1]),
        f'<TD WIDTH="{max(1, spare)}"></TD></TR>',
        *(_row(entry, palette, cuts if plan else None) for entry in rows),
    ]
    notes = [("red", "the share that the plan removes")] if plan else []
    if barriers:
        notes.append(("red box", "a barrier: an operator that freezes what reaches it"))
    for sign, meaning in notes:
        text = f'<FONT COLOR="{RED}"><B>{sign}</B></FONT>&#160;&#160; {grey(meaning, 10)}'
        lines.append(f"<TR><TD {across}>{text}</TD></TR>")
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4" CELLPADDING="1">{"".join(lines)}</TABLE>'


_RIGHT = ("units", "parameters per unit", "total", "stay")


def compact(count: int) -> str:
    """A count in three digits: ``1,152``, ``45.1 M``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 10 * size or (count >= size and size > 10**3):
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size:,} {unit}"
    return f"{count:,}"


def _summary(program: Program, only: Group | None, plan: Plan | None) -> str:
    if only is not None:
        place = only.module or "the whole model"
        count = f"{_counted(len(only.slices), 'slice')} of {_counted(len(only.parameters), 'tensor')}"
        return f"{_sized(f'<B>{only.name}</B>', 13)}&#160; {_sized(f'in {escape(place)}: {count}', 13)}"
    if plan is None:
        return _sized(f"{program.parameter_count:,} parameters", 13)
    change = f"{plan.before.parameters:,} → {plan.after.parameters:,} parameters"
    return f"{_sized(change, 13)}&#160; {_sized(f'<B>−{100 * plan.ratio:.1f} %</B>', 13, RED)}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("s" if count != 1 else "")


def _row(entry: LegendEntry, palette: Palette, cuts: Mapping[str, Cut] | None) -> str:
    first = entry.groups[0]
    fills = list(dict.fromkeys(palette.fill(g) for g in entry.groups))
    swatch = "".join(f'<TD BGCOLOR="{fill}" WIDTH="{30 // len(fills)}" HEIGHT="12"></TD>' for fill in fills)
    cells = [
        f'<TD><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR>{swatch}</TR></TABLE></TD>',
        _aligned(f"<B>{escape(entry.names)}</B>", about=", ".join(g.name for g in entry.groups)),
        _aligned(first.kind.replace("_", " ")),
        _aligned(_span([g.size for g in entry.groups]), right=True),
        _aligned(_span([g.parameters_per_unit for g in entry.groups]), right=True),
        _aligned(compact(entry.total), right=True, about=f"{entry.total:,} parameters"),
    ]
    if cuts is not None:
        left = [len(cuts[g.name].kept) if g.name in cuts else g.size for g in entry.groups]
        cells.append(_aligned("all" if left == [g.size for g in entry.groups] else f"<B>{_span(left)}</B>", right=True))
    state = escape(entry.state)
    cells.append(_aligned(state if first.prunable else grey(state, 10), about=first.reason))
    return "<TR>" + "".join(cells) + "</TR>"


def _aligned(text: str, right: bool = False, about: str = "") -> str:
    body = text if not text or text.startswith("<FONT") else _sized(text, 11)
    return f'<TD ALIGN="{"RIGHT" if right else "LEFT"}"{tooltip(about)}>{body}</TD>'


def _sized(text: str, size: int, colour: str = DARK) -> str:
    return f'<FONT POINT-SIZE="{size}" COLOR="{colour}">{text}</FONT>'


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _plain(reason: str) -> str:
    """A reason without the place it was found at: the same for every layer."""
    return re.sub(r" at %\S+ = \S+$", "", reason)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: text.rindex(" ", 0, length)] + " …"


def _spans(names: Sequence[str]) -> Iterable[str]:
    """``ffn0, ffn1, ffn2, ffn5`` as ``ffn0–ffn2, ffn5``."""

    def key(pair: tuple[int, str]) -> tuple[str, int]:
        stem = pair[1].rstrip("0123456789")
        number = pair[1][len(stem) :]
        return stem, int(number) - pair[0] if number else -1

    for _, run in groupby(enumerate(names), key):
        found = [name for _, name in run]
        yield found[0] if len(found) == 1 else f"{found[0]}–{found[-1]}"
