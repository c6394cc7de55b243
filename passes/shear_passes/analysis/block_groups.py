"""Groups of residual blocks: the layers of a list that only add to their stream, and the blocks inside of them.

A module of a list is a layer that can go when its blocks are a chain from what enters it to what leaves it, and
nothing else happens in it: no norm after the sum, no value that other layers read. Its unit is the whole module. The
blocks of layers (attention, MLP) are units of groups of their own, which exist in the graph alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from shear_ir.axes import Axis, Freeze, Indices
from shear_ir.nodes import module_path
from shear_ir.paths import common, inside, last, parent
from shear_ir.program import Program
from shear_passes.analysis.group import Group, Slice
from shear_passes.analysis.infer_axes import Axes
from shear_passes.analysis.residual_blocks import Block, dead_with, unchanged
from shear_passes.analysis.roles import Kind
from shear_passes.ops.registry import op_name

BLOCK_KINDS: tuple[Kind, ...] = ("block", "attention_block", "mlp_block")


@dataclass(frozen=True, eq=False)
class Unit:
    """What leaves as one: a chain of blocks. ``path``: its module; ``whole``: whether the module is nothing else.

    ``parameters``: tensors that go with it; ``reason``: why it cannot go, empty when it can.
    """

    path: str
    blocks: tuple[Block, ...]
    whole: bool
    parameters: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Owned(Slice):
    """A tensor that leaves with ``unit`` as a whole; dim 0 stands for all of it."""

    unit: int = 0

    @cached_property
    def index_map(self) -> list[Indices]:
        """The one unit that owns every index of the dim."""
        return [np.full(self.expression.size, self.unit, dtype=np.int64)]


@dataclass(frozen=True, eq=False)
class BlockGroup(Group):
    """Blocks of a kind, one unit each; ``parameters_per_unit`` is a mean. The axis counts them and is in no tensor."""

    units: tuple[Unit, ...] = ()

    @cached_property
    def fixed(self) -> Mapping[int, str]:
        """Units that cannot go, each with the reason."""
        return {i: unit.reason for i, unit in enumerate(self.units) if unit.reason}


@dataclass(frozen=True)
class Gone:
    """What goes with some units: names of nodes and of tensors, paths of whole modules."""

    nodes: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()


NOTHING = Gone()


def gone_with(program: Program, units: Sequence[Unit]) -> Gone:
    """What goes when all of ``units`` go; more than with each alone, where some share what they read."""
    if not units:
        return NOTHING
    dead = dead_with([block for unit in units for block in unit.blocks])
    modules = [unit.path for unit in units if unit.whole]
    return Gone(frozenset(n.name for n in dead), frozenset(_tensors(program, dead, modules)), tuple(modules))


def block_groups(program: Program, axes: Axes, blocks: Sequence[Block]) -> Iterator[BlockGroup]:
    """All groups of blocks, still without names: of each list of layers, then of what is in no such list."""
    for kind, module, units in _Layers(program, blocks).run() if blocks else ():
        yield _group(program, axes, kind, module, units)


def _group(program: Program, axes: Axes, kind: Kind, module: str, units: Sequence[Unit]) -> BlockGroup:
    stuck = all(unit.reason for unit in units)
    axis = Axis(len(units))
    slices = tuple(
        Owned(parameter, 0, axes.of_param[parameter][0], axis, place)
        for place, unit in enumerate(units)
        for parameter in unit.parameters
        if axes.of_param[parameter]
    )
    sizes = [sum(program.params[p].numel for p in u.parameters if program.params[p].kind == "parameter") for u in units]
    return BlockGroup(
        "", kind, len(units), axis, slices, sum(sizes) // len(units), module, tuple(units),
        freeze=Freeze(units[0].reason) if stuck else None,
    )  # fmt: skip


class _Layers:
    def __init__(self, program: Program, blocks: Sequence[Block]) -> None:
        self.program = program
        self.place = {node: i for i, node in enumerate(program.nodes)}
        self.inside: dict[str, list[fx.Node]] = {}
        for node in program.nodes:
            for path in _numbered(node):
                self.inside.setdefault(path, []).append(node)
        within = {n for block in blocks if not block.reason for n in block.region if n is not block.exit}
        self.blocks = [block for block in blocks if block.exit not in within]
        self.of_module: dict[str, list[Block]] = {}
        for block in blocks:
            for path in _numbered(block.exit):
                self.of_module.setdefault(path, []).append(block)

    def run(self) -> Iterator[tuple[Kind, str, list[Unit]]]:
        anchored: list[str] = []
        for up, units in self._lists():
            anchored.append(up)
            yield "block", up, units
            yield from self._parts(up, units)
        loose: dict[str, list[Block]] = {}
        for block in self.blocks:
            if not any(parent(path) in anchored for path in _numbered(block.exit)):
                loose.setdefault(self._class(block), []).append(block)
        for alike in loose.values():
            yield "block", common([b.path for b in alike]), [self._part(b, b.path) for b in alike]

    def _lists(self) -> list[tuple[str, list[Unit]]]:
        """The outermost lists of which half can go as layers; of others, as lists of stages, those with none inside."""
        lists = dict.fromkeys(parent(path) for path in self.program.modules if last(path).isdigit())
        found: dict[str, list[Unit]] = {}
        stuck: dict[str, list[Unit]] = {}
        for up in sorted(lists, key=lambda path: path.count(".")):
            members = [p for p in self.program.modules if parent(p) == up and last(p).isdigit()]
            if any(map(self.of_module.get, members)) and not any(inside(up, other) for other in found):
                units = [self._layer(path) for path in sorted(members, key=lambda p: int(last(p)))]
                able = sum(not unit.reason for unit in units)
                (found if 2 * able >= len(units) else stuck)[up] = units
        for up, units in stuck.items():
            if not any(inside(other, up) or inside(up, other) for other in found):
                found[up] = units
        return sorted(found.items(), key=lambda item: list(lists).index(item[0]))

    def _layer(self, path: str) -> Unit:
        """A module of a list as a unit, with the reason where it is more than a chain of blocks."""
        chain = self._chain(path)
        if not chain:
            return Unit(path, (), True, (), "it adds nothing to a stream")
        region = {node for block in chain for node in block.region}
        said = next((block.reason for block in chain if block.reason), "")
        reason = said or self._beside(path, chain, region)
        return Unit(path, tuple(chain), True, self._parameters(chain, [path]), reason)

    def _tops(self, path: str) -> list[Block]:
        """The blocks of a module that are in no other block of it."""
        mine = self.of_module.get(path, [])
        within = {n for block in mine if not block.reason for n in block.region if n is not block.exit}
        return [block for block in mine if block.exit not in within]

    def _chain(self, path: str) -> list[Block]:
        """The blocks of a module that follow each other up to its last one."""
        by_exit = {block.exit: block for block in self._tops(path)}
        chain = [max(by_exit.values(), key=lambda block: self.place[block.exit])] if by_exit else []
        while chain and chain[0].entry in by_exit:
            chain.insert(0, by_exit[chain[0].entry])
        return chain

    def _beside(self, path: str, chain: Sequence[Block], region: set[fx.Node]) -> str:
        """What a module does beside its chain of blocks, as a sentence; empty when nothing."""
        entry, exit_ = chain[0].entry, chain[-1].exit
        inside = set(self.inside[path])
        if entry in inside:
            return f"%{entry.name} = {op_name(entry)} changes its stream, so it is more than its blocks"
        others = [node for node in region - inside if not unchanged(self.program, node)]
        other = min(others, key=self.place.__getitem__, default=None)
        if other is not None:
            return f"%{other.name} = {op_name(other)} of another module lies between its blocks"
        same, moved = {exit_}, {entry, *region}
        for node in self.inside[path]:
            if node in region or not self.program.types.get(node.name):
                continue
            sources = set(node.all_input_nodes)
            if sources & same and unchanged(self.program, node):
                same.add(node)
            elif sources & moved:
                return f"%{node.name} = {op_name(node)} changes its stream, so it is more than its blocks"
            elif any(user not in inside for user in node.users):
                reader = next(user for user in node.users if user not in inside)
                return f"%{node.name} = {op_name(node)} is made in it, and %{reader.name} reads it elsewhere"
        return ""

    def _parts(self, up: str, layers: Sequence[Unit]) -> Iterator[tuple[Kind, str, list[Unit]]]:
        """The blocks of layers that are more than one, by what they do and their place in the layer."""
        alike: dict[tuple[Kind, int], list[Unit]] = {}
        for layer in layers:
            tops = self._tops(layer.path)
            if len(tops) == 1 and not layer.reason:
                continue
            for place, block in enumerate(tops):
                kind: Kind = "attention_block" if block.attention else "mlp_block"
                alike.setdefault((kind, place), []).append(self._part(block, layer.path))
        for (kind, _), units in sorted(alike.items(), key=lambda item: item[0][1]):
            yield kind, up, units

    def _part(self, block: Block, within: str) -> Unit:
        path = block.path if inside(block.path, within) else within
        return Unit(path, (block,), False, self._parameters([block], []), block.reason)

    def _parameters(self, blocks: Sequence[Block], modules: Sequence[str]) -> tuple[str, ...]:
        return tuple(_tensors(self.program, dead_with(blocks), modules))

    def _class(self, block: Block) -> str:
        info = self.program.modules.get(module_path(block.exit))
        return info.type if info else ""


def _tensors(program: Program, dead: set[fx.Node], modules: Sequence[str]) -> Iterator[str]:
    """Tensors that only dead nodes read, and those of whole modules that nothing reads."""
    for name, node in program.placeholder_of.items():
        if node in dead or (not node.users and any(inside(name, module) for module in modules)):
            yield name


def _numbered(node: fx.Node) -> list[str]:
    """The modules around a call that have a number in a list."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(dict.fromkeys(str(path) for path, _ in stack.values() if last(str(path)).isdigit()))
