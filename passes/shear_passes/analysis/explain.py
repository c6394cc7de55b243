"""Why slices leave together, or cannot: the shortest chains of operators from one slice to another, or to a freeze.

Between two slices of a group lies a path of calls, each of which ties one dim of a value to one of another; the
shortest ones from the first slice to all others make a tree, which is the proof of the group. Chains that read the
same but for the numbers of their layers are told once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
from torch import fx

from shear_ir.axes import Dim, Hold, atoms
from shear_ir.errors import ShearError
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.nodes import module_path, source_line
from shear_ir.printer import op_text, value_names
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BlockGroup
from shear_passes.analysis.dump import short_reason
from shear_passes.analysis.explanation import At, Chain, Explanation, Proof, Step
from shear_passes.analysis.find_groups import FindGroups, Group, Groups
from shear_passes.analysis.ties import NUMBERS, Place, Tie, Ties


@dataclass(frozen=True)
class Explain(Analysis[Explanation]):
    """The proof of ``of``: a group, a parameter, or ``parameter:dim``; raises ``ShearError`` for an unknown name."""

    of: str

    requires = (FindGroups,)

    def run(self, program: Program, analyses: AnalysisManager) -> Explanation:
        """Linear in the calls that the axis meets, for each of its slices at most the length of its chain."""
        groups = analyses.get(FindGroups())
        writer = _Writer(program, groups)
        whole = [writer.blocks(group) for group in groups.blocks if group.name == self.of]
        proofs = whole or [writer.proof(group, places) for group, places in _asked(self.of, groups, writer)]
        return Explanation(self.of, program.owner, tuple(proofs))


class _Writer:
    def __init__(self, program: Program, groups: Groups) -> None:
        self.program, self.groups = program, groups
        self.ties = Ties(groups.axes)
        self.names = value_names(program)

    def proof(self, group: Group, first: Sequence[Place]) -> Proof:
        """The proof of a group from the slice whose occurrences come ``first``."""
        graph = self.ties.graph(group.axis)
        ends = list(dict.fromkeys([*first, *self.slices(group)]))
        graph.add_nodes_from(ends)
        reached = nx.node_connected_component(graph, ends[0])
        held = group.freeze
        return Proof(
            group=group.name,
            kind=group.kind,
            size=group.size,
            slices=len(group.slices),
            module=group.module,
            reason=group.reason,
            rescalable=group.rescalable,
            root=self._at(ends[0]),
            freeze=self._freeze(graph, group, first) if held and held.at else None,
            chains=tuple(_folded(self._tree(graph, ends))),
            apart=tuple(self._at(end) for end in ends if end not in reached),
            seen=self._seen(group) if held and not held.at else (),
        )

    def blocks(self, group: BlockGroup) -> Proof:
        """What enters and leaves each unit of a group of blocks, and the sums in it."""
        chains = [
            Chain(
                self._whole(unit.blocks[0].entry),
                tuple(self._step_to(block.exit, self._whole(block.exit)) for block in unit.blocks),
                reason=short_reason(unit.reason, self.names),
            )
            for unit in group.units
        ]
        return Proof(
            group.name, group.kind, group.size, len(group.slices), group.module,
            short_reason(group.reason, self.names), False, chains[0].start, None, tuple(_folded(chains)), blocks=True,
        )  # fmt: skip

    def _whole(self, node: fx.Node) -> At:
        return At(self.names[node.name], None, "")

    def slices(self, group: Group) -> list[Place]:
        """The occurrences of a group in parameters, in graph order."""
        return [place for s in group.slices for place in self.places(group, s.parameter, s.dim)]

    def places(self, group: Group, parameter: str, dim: int) -> list[Place]:
        """The occurrences of a group in one dim of a parameter."""
        node = self.program.placeholder_of[parameter]
        return [place for place in self.ties.places(node, group.axis) if place.dim == dim]

    def _tree(self, graph: nx.Graph[Place | Tie], ends: Sequence[Place]) -> Iterator[Chain]:
        """A chain for each end but the first, from the first or from where an earlier chain has been."""
        before = {node: source for source, node in nx.bfs_edges(graph, ends[0])}
        known: set[Place | Tie] = {ends[0]}
        told: set[Any] = set()
        for end in (one for one in ends[1:] if one in before):
            path: list[Place | Tie] = [end]
            while path[-1] not in known or isinstance(path[-1], Tie):
                path.append(before[path[-1]])
            known.update(path)
            path.reverse()
            # Halves of one dim that leave together mostly do so by the same calls.
            calls = tuple(p.slot if isinstance(p, Place) else p.node for p in path)
            if len(path) > 1 and calls not in told:
                told.add(calls)
                yield self._chain(path)

    def _freeze(self, graph: nx.Graph[Place | Tie], group: Group, first: Sequence[Place]) -> Chain | None:
        """The shortest chain from a slice to the call that froze the axis."""
        held = group.freeze
        assert held is not None
        node, goal = self.ties.node[held.at], Tie(held.at, -1)
        mine = [p for n in (*node.all_input_nodes, node) for p in self.ties.places(n, group.axis)]
        frozen, summed = self._said(node, mine)
        graph = graph.copy()
        graph.add_edges_from((goal, place) for place in frozen or summed or mine)
        far = nx.single_source_shortest_path_length(graph, goal) if goal in graph else {}
        starts = [place for place in first or self.slices(group) if place in far]
        if not starts:
            return None
        before = {node: source for source, node in nx.bfs_edges(graph, goal)}
        path: list[Place | Tie] = [min(starts, key=far.__getitem__)]
        while path[-1] != goal:
            path.append(before[path[-1]])
        return self._chain(path, zeros=bool(summed) and not frozen and held.hold is Hold.HARD)

    def _said(self, node: fx.Node, mine: Sequence[Place]) -> tuple[list[Place], list[Place]]:
        """The occurrences that the rule of a call freezes, and those it sums over."""
        if node.op != "call_function":
            return [], []
        said = self.ties.of_call(node)
        return [p for p in mine if p in said.frozen], [p for p in mine if p in said.summed]

    def _seen(self, group: Group) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op_text(node) for node in self.ties.calls_of.get(group.axis, ())))

    def _chain(self, path: Sequence[Place | Tie], zeros: bool = False) -> Chain:
        """A path of places and ties in turn as people read it; ``zeros``: say where removed entries stop being zero."""
        steps = [self._step(zeros, *path[place : place + 3]) for place in range(0, len(path) - 1, 2)]
        assert isinstance(path[0], Place)
        return Chain(self._at(path[0]), tuple(steps))

    def _step(self, zeros: bool, before: Place | Tie, tie: Place | Tie, to: Place | Tie | None = None) -> Step:
        assert isinstance(before, Place)
        node = self.ties.node[tie.node]
        if not isinstance(to, Place):
            return self._step_to(node, None)
        spoils = zeros and to.node == node.name and self._zero(before) and not self._zero(to)
        return self._step_to(node, self._at(to), spoils)

    def _step_to(self, node: fx.Node, to: At | None, spoils: bool = False) -> Step:
        operator = op_text(node) if node.op == "call_function" else node.op
        value = self.names.get(node.name, "")
        return Step(node.name, operator, value, module_path(node), source_line(node), to, spoils)

    def _zero(self, place: Place) -> bool:
        return list(atoms(self._dim(place)))[place.leaf] in self.groups.zeros.of_node.get(place.node, ())

    def _dim(self, place: Place) -> Dim:
        axes = self.groups.axes
        numbers = axes.numbers.get((place.node, place.result))
        return numbers if place.dim == NUMBERS and numbers else axes.of_node[place.node][place.result][place.dim]

    def _at(self, place: Place) -> At:
        dim = self._dim(place)
        leaves = list(atoms(dim))
        mine = [number for number, atom in enumerate(leaves) if atom is leaves[place.leaf]]
        which = f"{_ordinal(mine.index(place.leaf) + 1)} {self.groups.label(leaves[place.leaf])}"
        number = f"[{place.result}]" if len(self.groups.axes.of_node[place.node]) > 1 else ""
        return At(self.names[place.node] + number, place.dim, self.groups.show(dim), which if len(mine) > 1 else "")


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number // 10 % 10 != 1 else "th"
    return f"{number}{ending}"


def _asked(name: str, groups: Groups, writer: _Writer) -> Iterator[tuple[Group, list[Place]]]:
    """The groups to explain, each with the slice that was asked for; no slice for a group as a whole."""
    named = {group.name: group for group in groups.by_axis.values()}
    if name in named:
        yield named[name], []
        return
    params = {alias: p for p in groups.program.params.values() for alias in (p.name, *p.aliases)}
    parameter, colon, dim = name.rpartition(":") if name not in params else (name, "", "")
    if parameter not in params:
        raise _unknown(name, [*named, *params])
    found = params[parameter]
    rank = len(found.type.shape)
    if colon and not (dim.isdigit() and int(dim) < rank):
        raise ShearError(f"{parameter} has {rank} dims, counted from 0: there is no dim {dim or 'without a number'}")
    for group, place in _axes_of(found.name, [int(dim)] if colon else range(rank), groups):
        yield group, writer.places(group, found.name, place)


def _axes_of(parameter: str, dims: Iterable[int], groups: Groups) -> Iterator[tuple[Group, int]]:
    """Each axis of a parameter once, with the first of ``dims`` it occurs in."""
    found = {a: d for d in reversed(list(dims)) for a in reversed(list(atoms(groups.axes.of_param[parameter][d])))}
    return ((groups.by_axis[atom], dim) for atom, dim in reversed(found.items()))


def _unknown(name: str, known: Sequence[str]) -> ShearError:
    near = difflib.get_close_matches(name.rpartition(":")[0] or name, known, n=4, cutoff=0.4) or known[:4]
    return ShearError(f"the model has no group or parameter {name!r}; near names: {', '.join(near) or 'none'}")


def _folded(chains: Iterable[Chain]) -> Iterator[Chain]:
    """Chains that read the same but for the numbers of layers, as the first of them."""
    alike: dict[Any, list[Chain]] = {}
    for chain in chains:
        alike.setdefault(_sign(chain), []).append(chain)
    return (replace(first, alike=tuple(others)) for first, *others in alike.values())


def _sign(chain: Chain) -> Any:
    steps = ((s.operator, s.line, _plain(s.module), _sign_at(s.to)) for s in chain.steps)
    return _plain(chain.reason), _sign_at(chain.start), *steps


def _sign_at(at: At | None) -> Any:
    return at and (_plain(at.value), at.dim, _plain(at.part))


def _plain(text: str) -> str:
    return re.sub(r"\d+", "#", text)
