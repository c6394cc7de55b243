"""Block influence: how far a residual block turns its stream (ShortGPT; Men et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.nn.functional import cosine_similarity

from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import Importance, Score, Scored, Scores, Statistic, candidates
from shear_passes.importance.calibration import Calibration, Data, Observer

StreamPlace = tuple[str, int]
"""A group by name and a unit of it."""


@dataclass(frozen=True)
class Ends:
    """Where a block can be seen: ``entry`` is read by the module of that path; the block adds what the modules
    ``branches`` return, or, without any, the entry's own module returns the stream after it."""

    entry: str
    branches: tuple[str, ...] = ()


@dataclass(eq=False)
class StreamTurn:
    """The sum over ``count`` tokens of the cosine between the stream before and after a block.

    ``broken``: what modules showed was not this block alone.
    """

    cosines: float = 0.0
    count: int = 0
    broken: bool = False

    @property
    def influence(self) -> float:
        """``1 − E[cos(h_in, h_out)]``."""
        return 1.0 - self.cosines / self.count


@dataclass(frozen=True)
class BlockStatistics(Statistic[Mapping[StreamPlace, StreamTurn]]):
    """By group and unit, for every unit of groups of blocks that modules show the ends of."""

    requires = (FindGroups, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> Observer:
        """Watches the modules at both ends."""
        groups = [g for g in analyses.get(FindGroups()) if _units(g)]
        ends = {(g.name, i): ends_of(u) for g in groups for i, u in enumerate(_units(g)) if not u.reason}
        return BlockObserver({place: found for place, found in ends.items() if found is not None})


def _units(group: Group) -> tuple[Any, ...]:
    """The blocks of a group of blocks; none for a group of an axis."""
    return tuple(getattr(group, "units", ()))


def ends_of(unit: Any) -> Ends | None:
    """Where a unit, a chain of residual blocks, can be seen; None where no module shows it."""
    if unit.whole:
        return Ends(unit.path)
    if len(unit.blocks) != 1:
        return None
    (block,) = unit.blocks
    outer = _modules(block.branches[0][0])
    made = {*outer, *_modules(block.entry)}
    # The innermost module of a reader takes the stream as its input, unless the stream was made in it.
    readers = [_modules(user)[-1:] for user in _readers(block.entry) if user in block.region]
    entries = [path for (path,) in filter(None, readers) if path not in made]
    branches = [_maker(node.args[place], outer) for node, place in block.branches]
    if not entries or not all(branches):
        return None
    return Ends(entries[0], tuple(str(b) for b in branches))


def _maker(node: Any, outer: tuple[str, ...]) -> str:
    """The module whose result ``node`` is; dropout between it and the sum does nothing in evaluation mode."""
    while isinstance(node, fx.Node) and _drops(node):
        node = node.args[0]
    path = _below(node, outer) if isinstance(node, fx.Node) else ""
    # What its module makes of it afterwards would be seen instead.
    return path if path and all(_drops(user) or not _within(user, path) for user in node.users) else ""


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, as it is or after dropout."""
    for user in node.users:
        if _drops(user):
            yield from _readers(user)
        else:
            yield user


def _drops(node: fx.Node) -> bool:
    return "dropout" in str(node.target)


def _modules(node: fx.Node) -> tuple[str, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(str(path) for path, _ in stack.values())


def _below(node: fx.Node, outer: tuple[str, ...]) -> str:
    """The outermost module around ``node`` that is not among ``outer``; empty when there is none."""
    return next((path for path in _modules(node) if path not in outer), "")


def _within(node: fx.Node, path: str) -> bool:
    return path in _modules(node)


class BlockObserver(Observer):
    """Hooks at both ends of blocks."""

    def __init__(self, ends: Mapping[StreamPlace, Ends]) -> None:
        self.ends = ends
        self.found = {place: StreamTurn() for place in ends}

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        with ExitStack() as hooks:
            for place, ends in self.ends.items():
                watch = StreamWatch(calibration, self.found[place], ends)
                module = calibration.model.get_submodule(ends.entry)
                hooks.callback(module.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
                for path in ends.branches or (ends.entry,):
                    after = calibration.model.get_submodule(path)
                    hooks.callback(after.register_forward_hook(watch.after).remove)
            yield

    def finish(self) -> Mapping[StreamPlace, StreamTurn]:
        return self.found


@dataclass(eq=False)
class StreamWatch:
    """Sees a block begin and end, once per forward pass."""

    calibration: Calibration
    turn: StreamTurn
    ends: Ends
    entry: Tensor | None = None
    added: list[Tensor] = field(default_factory=list)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A module that is called again before its block has ended belongs to more than this block.
        self.turn.broken |= self.entry is not None and self.calibration.watching
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        self.entry = given[0].detach() if given and self.calibration.watching else None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple | list) else output
        if self.entry is None or not self.calibration.watching:
            return
        if not isinstance(made, Tensor) or made.shape != self.entry.shape:
            self.turn.broken = True
            return
        self.added.append(made.detach())
        if len(self.added) == max(1, len(self.ends.branches)):
            left = self.added[0] if not self.ends.branches else self.entry + sum(self.added)
            self._add(self.entry, left)
            self.entry = None
            self.added.clear()

    def _add(self, entry: Tensor, left: Tensor) -> None:
        # Images have their features in dim 1; of sequences each token counts.
        before, after = (t.float().flatten(1) if t.dim() > 3 else t.float() for t in (entry, left))
        cosines = cosine_similarity(before, after, dim=-1)
        mask = next((m for m in self.calibration.masks if m.shape == cosines.shape), None)
        cosines = cosines if mask is None else cosines[mask.to(cosines.device)]
        self.turn.cosines += float(cosines.double().sum())
        self.turn.count += cosines.numel()


@dataclass(frozen=True)
class BlockInfluence(Importance):
    """``1 − E[cos(h_in, h_out)]`` over tokens: the block that turns its stream least goes first.

    Scores groups of blocks alone: whole layers, or attention and MLP by themselves.
    """

    requires = (FindGroups, BlockStatistics)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """Cosines between the two ends of every block."""
        return (BlockStatistics(),)

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without data; asking for a group that is no group of blocks does so later."""
        found = analyses.get(BlockStatistics())
        scores: dict[Group, Score] = {}
        reasons: dict[Group, str] = {}
        for group in candidates(analyses):
            units = _units(group)
            unseen = [u.path for i, u in enumerate(units) if not u.reason and not _seen(found, group, i)]
            if not units or unseen:
                reasons[group] = f"no module shows both ends of {unseen[0]}" if unseen else "it is no group of blocks"
                continue
            turns = [found.get((group.name, i)) for i in range(len(units))]
            scores[group] = np.array([np.inf if turn is None else turn.influence for turn in turns])
        return Scored("block-influence", scores, reasons)


def _seen(found: Mapping[StreamPlace, StreamTurn], group: Group, unit: int) -> bool:
    turn = found.get((group.name, unit))
    return turn is not None and turn.count > 0 and not turn.broken
