"""Which occurrences of an axis an operator ties together, and which it freezes: its rule, run alone.

An axis occurs in dims of values. To see what one call says about them, its rule runs once more on operands whose
leaves are all distinct, as if no other call had been typed: leaves that are one atom afterwards were tied by this call,
leaves that are frozen were frozen by it. Nothing is recorded while a program is analysed, so that costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import networkx as nx
from torch import fx

from shear_ir.axes import Axis, Dim, Product, atoms, concat, product, resolve, unify
from shear_passes.analysis.infer_axes import Axes, Inference

Slot = tuple[str, int, int]
NUMBERS = -1
"""In place of a dim: the entries themselves, where they number the indices of one, as those of topk do."""


@dataclass(frozen=True)
class Place:
    """One occurrence of an axis: dim ``dim`` of result ``result`` of a node, and which of that dim's leaves it is.

    ``dim`` is ``NUMBERS`` where the entries of the result number the indices of a dim.
    """

    node: str
    result: int
    dim: int
    leaf: int

    @property
    def slot(self) -> Slot:
        """The dim, whichever the leaf."""
        return self.node, self.result, self.dim


@dataclass(frozen=True)
class Tie:
    """Call ``node`` makes the occurrences around it in the graph of an axis one; ``number`` tells its ties apart."""

    node: str
    number: int


@dataclass(frozen=True)
class Local:
    """What one call says: the atom of each leaf once its rule ran alone, and the places it freezes or sums over."""

    classes: tuple[tuple[Place, ...], ...]
    frozen: frozenset[Place]
    summed: frozenset[Place]


class Ties:
    """What each call of an analysed program says about the axes it meets; each is asked at most once."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.node = {node.name: node for node in axes.program.nodes}
        self._inference = Inference(axes.program)
        self._local: dict[str, Local] = {}
        self._home = dict(_homes(axes.program.nodes))

    @cached_property
    def calls_of(self) -> Mapping[Axis, list[fx.Node]]:
        """The calls that each axis meets, in graph order."""
        found: dict[Axis, list[fx.Node]] = {}
        for node in self.axes.program.calls():
            met = (a for n in (*node.all_input_nodes, node) for dim in self._dims(n).values() for a in atoms(dim))
            for atom in dict.fromkeys(met):
                found.setdefault(atom, []).append(node)
        return found

    def places(self, node: fx.Node, atom: Axis) -> list[Place]:
        """Where an axis occurs in the results of a node; what only unpacks a result is that result."""
        slots = self._dims(node).items()
        return [Place(*slot, leaf) for slot, dim in slots for leaf, found in enumerate(atoms(dim)) if found is atom]

    def graph(self, atom: Axis) -> nx.Graph[Place | Tie]:
        """The occurrences of an axis and the calls that tie them: a bipartite graph, linear in the calls it meets."""
        made: nx.Graph[Place | Tie] = nx.Graph()
        for call in self.calls_of.get(atom, ()):
            mine = {p for n in (*call.all_input_nodes, call) for p in self.places(n, atom)}
            for number, places in enumerate(self.of_call(call).classes):
                tied = [place for place in places if place in mine]
                if len(tied) > 1:
                    made.add_edges_from((place, Tie(call.name, number)) for place in tied)
        return made

    def of_call(self, node: fx.Node) -> Local:
        """What a call ties, freezes and sums over."""
        if node.name not in self._local:
            self._local[node.name] = self._alone(node)
        return self._local[node.name]

    def _alone(self, node: fx.Node) -> Local:
        leaves: dict[Place, Axis] = {}
        alone = self._inference
        alone.of_node, alone.numbers, alone.contractions, alone.rankings = {}, {}, [], []
        for operand in dict.fromkeys(node.all_input_nodes):
            self._feed(operand, leaves)
        alone.call(node)
        dims = (*(dim for made in alone.contractions for dim in made.over), *(made.over for made in alone.rankings))
        over = {a for dim in dims for a in atoms(dim)}
        # A result may be split more finely elsewhere than this call can know.
        for (_, result, place), dim in self._distinct(node, leaves).items():
            values = alone.numbers[node.name, result] if place == NUMBERS else alone.of_node[node.name][result][place]
            unify(values, dim)
        return _local(node, leaves, over)

    def _feed(self, operand: fx.Node, leaves: dict[Place, Axis]) -> None:
        """Let the call read dims whose leaves are all distinct."""
        distinct = self._distinct(operand, leaves)
        dims = (dim for (_, _, place), dim in distinct.items() if place != NUMBERS)
        results = self.axes.of_node.get(operand.name)
        if results is not None:
            self._inference.of_node[operand.name] = [tuple(islice(dims, len(one))) for one in results]
        for (_, _, place), dim in distinct.items():
            if place == NUMBERS:
                self._inference.numbers[operand.name, 0] = dim

    def _distinct(self, node: fx.Node, leaves: dict[Place, Axis]) -> dict[Slot, Dim]:
        """The dims of a node with every leaf an atom of its own."""
        return {slot: _renamed(dim, slot, count(), leaves) for slot, dim in self._dims(node).items()}

    def _dims(self, node: fx.Node) -> dict[Slot, Dim]:
        """The dims of the results of a node by what they are dims of."""
        home, first = self._home.get(node.name, (node.name, 0))
        results = self.axes.of_node.get(node.name, [])
        found = {
            (home, first + at, place): resolve(dim) for at, dims in enumerate(results) for place, dim in enumerate(dims)
        }
        for at in range(len(results)):
            if (node.name, at) in self.axes.numbers:
                found[home, first + at, NUMBERS] = resolve(self.axes.numbers[node.name, at])
        return found


def _homes(nodes: Iterable[fx.Node]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Each node that only unpacks a result of another: whose, and the number of the result."""
    for node in nodes:
        if node.target is operator.getitem:
            source, number = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(number, int)
            yield node.name, (source.name, number)


def _renamed(dim: Dim, slot: Slot, number: Iterator[int], leaves: dict[Place, Axis]) -> Dim:
    """A solved dim with an atom of its own for every leaf, each noted in ``leaves``."""
    if isinstance(dim, Axis):
        return leaves.setdefault(Place(*slot, next(number)), Axis(dim.size))
    if isinstance(dim, Product):
        return product([_renamed(factor, slot, number, leaves) for factor in dim.factors])
    return concat([_renamed(part, slot, number, leaves) for part in dim.parts])


def _local(node: fx.Node, leaves: Mapping[Place, Axis], over: Collection[Axis]) -> Local:
    classes: dict[Axis, list[Place]] = {}
    for place, leaf in leaves.items():
        for root in atoms(leaf):
            classes.setdefault(root, []).append(place)
    held = {root for root in classes if root.freeze is not None and root.freeze.at == node.name}
    return Local(
        tuple(map(tuple, classes.values())),
        frozenset(place for root in held for place in classes[root]),
        frozenset(place for root in classes.keys() & over for place in classes[root]),
    )
