"""Repeated blocks folded into the first of them: ``layers 0–31 · 32 × LlamaDecoderLayer``.

Siblings ``layers.0``, ``layers.1``, ... are alike when what is drawn inside of them is: the same classes, tensors of
the same dims, the same kinds of axes. Runs of likes fold, also when they take turns (``A B A B A B``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shear_backends.draw.model import Box, Item, Line
from shear_ir.axes import Axis, atoms, show
from shear_ir.errors import ShearError
from shear_ir.paths import split
from shear_ir.printer import numbers
from shear_passes.analysis.find_groups import Groups

_LONGEST_TURN = 8


@dataclass(frozen=True)
class Run:
    """Siblings that repeat after ``period``; ``members``: their numbers. The first round stands for all of them."""

    members: tuple[int, ...]
    period: int

    def like(self, number: int) -> tuple[int, ...]:
        """The members of one place in the round, which the same representative stands for."""
        return self.members[self.members.index(number) % self.period :: self.period]

    def round(self, number: int) -> int:
        """Which repetition a member belongs to."""
        return self.members.index(number) // self.period


@dataclass
class Folding:
    """``runs``: list of blocks to its runs. ``alike``: axis to itself and those of later blocks it stands for."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    alike: dict[Axis, list[Axis]] = field(default_factory=dict)

    def path(self, path: str) -> str:
        """The path of what stands for ``path`` in the picture."""
        return self._walk(path)[0]

    def shows(self, line: Line) -> bool:
        """Whether a line stays: not when it leads from one repetition of folded blocks to another."""
        tail, head = self._walk(line.tail)[1], self._walk(line.head)[1]
        return all(tail[run] == head[run] for run in tail.keys() & head.keys())

    def stands_for(self, path: str) -> tuple[int, ...]:
        """The numbers of the blocks that the representative at ``path`` stands for; empty for an unfolded one."""
        up, number = split(path)
        run = self._run(up, int(number)) if number.isdigit() else None
        return run.like(int(number)) if run else ()

    def _run(self, up: str, number: int) -> Run | None:
        return next((run for run in self.runs.get(up, ()) if number in run.members), None)

    def _walk(self, path: str) -> tuple[str, dict[tuple[str, Run], int]]:
        """The representative's path, and for each run on the way the repetition that ``path`` lies in."""
        module, mark, place = path.partition("#")
        done, rounds = "", dict[tuple[str, Run], int]()
        for part in module.split("."):
            run = self._run(done, int(part)) if part.isdigit() else None
            if run is not None:
                rounds[done, run] = run.round(int(part))
                part = str(run.like(int(part))[0])
            done = f"{done}.{part}" if done else part
        return done + mark + place, rounds


def fold(
    items: Iterable[Item],
    groups: Groups,
    *,
    kept: Mapping[str, int],
    least: int,
    unfolded: Collection[int] = (),
    gone: Collection[str] = (),
) -> Folding:
    """Fold every run of at least ``least`` alike blocks, leaving out the outermost blocks numbered ``unfolded``.

    ``kept``: group name to the units a plan leaves; blocks that lose different numbers of units are not alike, nor is
    one that is ``gone`` like one that stays.
    """
    folding = Folding()
    for up, blocks in _blocks(items).items():
        if len(blocks) < least or folding.path(up) != up:
            continue
        shared = set.intersection(*(_atoms(found) for found in blocks.values()))
        signed = {n: _signature(f"{up}.{n}", blocks[n], groups, kept, shared) for n in sorted(blocks)}
        held = unfolded if _outermost(up) else ()
        folding.runs[up] = list(
            _runs(list(signed), [n if n in held else (signed[n][0], f"{up}.{n}" in gone) for n in signed], least)
        )
        for run in folding.runs[up]:
            for first in run.members[: run.period]:
                for alike in zip(*(signed[n][1] for n in run.like(first)), strict=True):
                    folding.alike[alike[0]] = [b for a in alike for b in folding.alike.get(a, [a])]
    return folding


def parse_layers(text: str, items: Iterable[Item]) -> frozenset[int]:
    """``0-1,30`` as numbers of the model's outermost repeated blocks; raises ``ShearError`` in one sentence."""
    lists = {up: blocks for up, blocks in _blocks(items).items() if _outermost(up) and len(blocks) > 1}
    known = {n for blocks in lists.values() for n in blocks}
    if not known:
        raise ShearError(f"layers {text!r} cannot be unfolded: the model has no repeated blocks")
    wanted: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ShearError(f"layers {text!r} is not a range: write one number or first-last, as in 0-1 or 0,30-31")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ShearError(f"layers {text!r} is not a range: {last} comes before {first}")
        missing = next((n for n in (first, last) if n not in known), None)
        if missing is not None:
            have = ", ".join(f"{up}.{numbers(sorted(blocks))}" for up, blocks in lists.items())
            raise ShearError(f"layers {text!r}: there is no block {missing}; the model has {have}")
        wanted.update(range(first, last + 1))
    return frozenset(wanted)


def _blocks(items: Iterable[Item]) -> dict[str, dict[int, list[Item]]]:
    """List of blocks to number to the items inside; outer lists before inner ones."""
    found: dict[str, dict[int, list[Item]]] = {}
    for item in items:
        parts = item.path.partition("#")[0].split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:place]), {}).setdefault(int(part), []).append(item)
    return found


def _outermost(up: str) -> bool:
    return not any(part.isdigit() for part in up.split("."))


def _atoms(items: Iterable[Item]) -> set[Axis]:
    return {a for item in items if isinstance(item, Box) for row in item.rows for d in row.dims for a in atoms(d)}


def _signature(
    block: str, items: Iterable[Item], groups: Groups, kept: Mapping[str, int], shared: Collection[Axis]
) -> tuple[Hashable, list[Axis]]:
    """What is drawn inside a block, without its number and the names of axes that not all blocks share; and those."""
    own: dict[Axis, str] = {}

    def name(atom: Axis) -> str:
        group = groups.by_axis.get(atom)
        if group is None or atom in shared:
            return group.name if group else ""
        return own.setdefault(atom, f"{group.kind}#{len(own)} {group.prunable} {kept.get(group.name)}")

    def sign(item: Item) -> Hashable:
        place = item.path[len(block) :]
        if not isinstance(item, Box):
            return place, item.kind, item.label
        rows = ((row.names, bool(row.tied), *(show(d, name) for d in row.dims)) for row in item.rows)
        return place, item.klass, tuple(rows)

    return tuple(sign(item) for item in sorted(items, key=lambda i: i.path)), list(own)


def _runs(members: Sequence[int], signs: Sequence[Hashable], least: int) -> Iterator[Run]:
    """The longest run from each place on, with the shortest turn."""
    start = 0
    while start < len(members):
        length, period = max((_reach(signs, start, p), -p) for p in range(1, _LONGEST_TURN + 1))
        if length >= least:
            yield Run(tuple(members[start : start + length]), -period)
        start += length if length >= least else 1


def _reach(signs: Sequence[Hashable], start: int, period: int) -> int:
    """How many siblings repeat with the period, in whole rounds; 0 when there is only one round."""
    end = start + period
    while end < len(signs) and signs[end] == signs[end - period]:
        end += 1
    rounds = (end - start) // period
    return rounds * period if rounds > 1 else 0
