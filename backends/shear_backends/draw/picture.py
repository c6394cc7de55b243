"""From an analysed program to graphviz source: what is drawn, folded, framed, coloured."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from shear_backends.draw.boxes import Boxes
from shear_backends.draw.chips import Chips
from shear_backends.draw.dot import Dot
from shear_backends.draw.flow import Flow, find_flow
from shear_backends.draw.fold import Folding, fold, parse_layers
from shear_backends.draw.legend import header
from shear_backends.draw.model import Box, Line, Op
from shear_backends.draw.palette import Palette
from shear_backends.draw.render import render
from shear_backends.draw.tree import grow, label
from shear_ir.errors import ShearError
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Group, Groups

REPEATS = 3
"""So many blocks in a row fold; in the picture of one group more than eight."""
CROWD_OF_GROUPS = 200
"""Above so many items, blocks that lose different numbers of units fold too, and show ranges."""


def draw(
    program: Program,
    groups: Groups,
    path: Path,
    *,
    group: str | None = None,
    layers: str | None = None,
    plan: Plan | None = None,
) -> Path:
    """Draw the model's modules, tensors and groups into ``path``: .svg, .png, .pdf or .dot.

    ``group``: only this group, with all its slices. ``layers``: numbers of blocks to unfold, as in ``0-1,30``.
    ``plan``: mark what goes. Raises ``ShearError`` for an unknown group or block, ``PlanError`` for a plan of another
    model, ``SaveError`` where the file cannot be made.
    """
    return render(source(program, groups, group=group, layers=layers, plan=plan), Path(path))


def source(
    program: Program,
    groups: Groups,
    *,
    group: str | None = None,
    layers: str | None = None,
    plan: Plan | None = None,
) -> str:
    """The picture as graphviz source; the same input gives the same bytes."""
    if plan is not None:
        plan.require(program.digest)
    only = _named(groups, group)
    flow = find_flow(program, groups, Boxes(program, groups, only), only)
    every = Boxes(program, groups).by_path.values()
    unfolded = frozenset[int]() if layers is None else parse_layers(layers, every)
    folding = _folded(flow, groups, unfolded, plan, only)
    lines = _folded_lines(flow, folding)
    drawn = [item for path, item in flow.items.items() if folding.path(path) == path]
    members: dict[str, list[Box]] = {}
    for path, item in flow.items.items():
        if isinstance(item, Box):
            members.setdefault(folding.path(path), []).append(item)
    palette = Palette((only,) if only else groups)
    cuts = {c.group: c for c in plan.cuts} if plan else {}
    dot = Dot(
        Chips(groups, palette, cuts, folding.alike),
        palette,
        lambda path: label(program, path, folding),
        members,
        plan,
    )
    barriers = sum(isinstance(item, Op) and item.kind == "barrier" for item in drawn)
    head = header(program, groups, only, palette, plan, barriers)
    return dot.source(f"groups of {program.owner}", head, grow(program, drawn, folding), lines)


def _named(groups: Groups, name: str | None) -> Group | None:
    if name is None:
        return None
    found = groups.by_name.get(name)
    if found is None:
        near = difflib.get_close_matches(name, groups.by_name, n=4, cutoff=0.4) or list(groups.by_name)[:4]
        raise ShearError(f"the model has no group {name!r}; near names: {', '.join(near) or 'none'}")
    return found


def _folded(flow: Flow, groups: Groups, unfolded: Collection[int], plan: Plan | None, only: Group | None) -> Folding:
    least = REPEATS if only is None else 9
    kept = {c.group: len(c.kept) for c in plan.cuts} if plan else {}

    def attempt(kept: Mapping[str, int]) -> Folding:
        gone = frozenset(plan.gone) if plan else frozenset[str]()
        return fold(flow.items.values(), groups, kept=kept, least=least, unfolded=unfolded, gone=gone)

    folding = attempt(kept)
    crowded = sum(folding.path(path) == path for path in flow.items) > CROWD_OF_GROUPS
    return attempt({}) if crowded and kept else folding


def _folded_lines(flow: Flow, folding: Folding) -> list[Line]:
    found: dict[tuple[str, str], Line] = {}
    for line in flow.lines:
        tail, head = folding.path(line.tail), folding.path(line.head)
        if folding.shows(line) and tail != head:
            found.setdefault((tail, head), replace(line, tail=tail, head=head))
    return list(found.values())
