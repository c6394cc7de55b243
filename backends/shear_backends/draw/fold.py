"""Repeated blocks folded into the first of them: ``layers 0–31 · 32 × LlamaDecoderLayer``.

Siblings ``layers.0``, ``layers.1``, ... are alike when what is drawn inside of them is: the same classes, tensors of
the same dims, the same kinds of axes. Runs of likes fold, also when they take turns (``A B A B A B``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shear_backends.draw.model import Box, Item, inside, parent
from shear_ir.axes import Axis, show
from shear_ir.errors import ShearError
from shear_passes.analysis.find_groups import Group, Groups

_LONGEST_TURN = 8


@dataclass(frozen=True)
class Run:
    """``repeats`` rounds of ``period`` siblings each; ``members``: their numbers. The first round stands for all."""

    members: tuple[int, ...]
    period: int

    def like(self, number: int) -> tuple[int, ...]:
        """The members that the same representative stands for."""
        return self.members[self.members.index(number) % self.period :: self.period]


class Folding:
    """``runs``: list path to its runs. ``alike``: axis to the axes of later blocks it stands for, itself first."""

    def __init__(
        self, items: Iterable[Item], groups: Groups, kept: Mapping[str, int], least: int, unfolded: Collection[int]
    ) -> None:
        self.runs: dict[str, list[Run]] = {}
        self.alike: dict[Axis, list[Axis]] = {}
        self.items: dict[str, list[Item]] = {}
        blocks: dict[str, dict[int, list[Item]]] = {}
        for item in items:
            self.items.setdefault(self.path(item.path), []).append(item)
            for up, number in _numbered(item.path):
                blocks.setdefault(up, {}).setdefault(number, []).append(item)
        for up, found in blocks.items():
            if len(found) < least or any(self._hidden(place) for place in _numbered(up)):
                continue
            signs = {n: _signature(f"{up}.{n}", found[n], groups, kept) for n in sorted(found)}
            held = unfolded if not any(True for _ in _numbered(up)) else ()
            self.runs[up] = _runs([n for n in signs if n not in held], [signs[n][0] for n in signs if n not in held], least)
            for run in self.runs[up]:
                for number in run.members[: run.period]:
                    self._pair([signs[n][1] for n in run.like(number)])
        self.items = {}
        for item in items:
            self.items.setdefault(self.path(item.path), []).append(item)
