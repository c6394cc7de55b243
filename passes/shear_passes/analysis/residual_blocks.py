"""Residual blocks: regions ``y = x + f(x)`` with one entry, x, and one exit, the sum.

The region holds what depends on x and leads to the sum. Whatever else it reads (masks, positions, encoder states,
parameters) was made without x, so x is its only entry from the stream; that the sum is its only exit is asked of the
post-dominator tree. Without the block the readers of y read x, which is what they read when f(x) is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
from torch import fx

from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.paths import common
from shear_ir.program import Program
from shear_passes.analysis.infer_axes import InferAxes
from shear_passes.analysis.memory import memory_of
from shear_passes.analysis.roles import attention_products
from shear_passes.analysis.vanish import FindZeros
from shear_passes.ops.registry import op_name
from shear_passes.ops.traits import Role, row_name, traits_of

_SINK = "output"
# Sums on the way from entry to exit: x + attention(x) + mlp(x), and one to spare.
_SUMS = 4


@dataclass(frozen=True, eq=False)
class Block:
    """``exit = entry + the branches``. ``branches``: sums, and the place of the operand that the block adds to each.

    ``region``: all that lies between, the exit with it. ``attention``: whether it multiplies activations with each
    other. ``path``: the smallest module that holds what maps its values. ``reason``: why it cannot go, empty when
    it can.
    """

    entry: fx.Node
    exit: fx.Node
    branches: tuple[tuple[fx.Node, int], ...]
    region: frozenset[fx.Node]
    path: str
    attention: bool
    reason: str = ""


@dataclass(frozen=True)
class FindBlocks(Analysis[tuple[Block, ...]]):
    """Every residual block in graph order of its exit; of blocks with the same exit the smallest."""

    requires = (InferAxes, FindZeros)

    def run(self, program: Program, analyses: AnalysisManager) -> tuple[Block, ...]:
        """Linear in the number of nodes, for streams without long skips."""
        axes = analyses.get(InferAxes())
        scores, mixes = attention_products(axes, analyses.get(FindZeros()))
        maps = {c.node for c in axes.contractions if not c.mean}
        products = {c.node for c in (*scores, *mixes)}
        return tuple(_Finder(program, maps, products).run())


class _Finder:
    def __init__(self, program: Program, maps: set[fx.Node], products: set[fx.Node]) -> None:
        self.program = program
        self.maps = maps
        self.products = products
        self.place = {node: i for i, node in enumerate(program.nodes)}
        self.memory = memory_of(program)
        self.after = _post_dominators(self.memory.sources)
        self.shared: dict[fx.Node, list[fx.Node]] = {}
        for node, made in self.memory.home.items():
            self.shared.setdefault(made, []).append(node)
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        for node, read in self.memory.sources.items():
            for source in read:
                self.readers.setdefault(source, []).append(node)

    def run(self) -> Iterator[Block]:
        for node in self.program.calls():
            if traits_of(node).role is Role.SUM:
                found = list(self._at(node, (), (), _SUMS))
                if found:
                    yield max(found, key=lambda block: self.place[block.entry])

    def _at(
        self, node: fx.Node, below: Sequence[tuple[fx.Node, int]], passed: Sequence[fx.Node], left: int
    ) -> Iterator[Block]:
        """Blocks that end in the first of ``below``, or in ``node``, and whose stream comes through ``node``."""
        for skip in (0, 1):
            if not self._passes(node, skip):
                continue
            branches = (*below, (node, 1 - skip))
            entry, same = self._stripped(node.args[skip])
            over = (*passed, node, *same)
            region = self._region(entry, branches, over)
            if region is not None and self._owns(region):
                yield self._block(entry, branches, region)
            elif left > 1 and traits_of(entry).role is Role.SUM:
                yield from self._at(entry, branches, over, left - 1)

    def _passes(self, node: fx.Node, skip: int) -> bool:
        """Whether the result is this operand plus the other one, element by element."""
        if len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
            return False
        if skip and node.kwargs.get("alpha", 1) != 1:
            return False
        return self.program.type(node.args[skip]) == self.program.type(node)  # type: ignore[arg-type]

    def _stripped(self, node: Any) -> tuple[fx.Node, list[fx.Node]]:
        """What ``node`` is the same as, and the calls in between that change nothing."""
        same = []
        while unchanged(self.program, node):
            same.append(node)
            node = node.args[0]
        return node, same

    def _region(
        self, entry: fx.Node, branches: Sequence[tuple[fx.Node, int]], over: Sequence[fx.Node]
    ) -> frozenset[fx.Node] | None:
        """All that depends on the entry and leads to a branch; None where a branch is no map of the entry."""
        tails = [node.args[place] for node, place in branches]
        first = self.place[entry]
        seen: set[fx.Node] = set()
        stack: list[Any] = [t for t in tails if self.place[t] > first]  # type: ignore[index]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += [n for n in self.memory.sources[node] if self.place[n] > first]
        mapped: dict[fx.Node, bool] = {entry: False}
        for node in sorted(seen, key=self.place.__getitem__):
            sources = [n for n in self.memory.sources[node] if n in mapped and self._carries(n)]
            if sources:
                mapped[node] = node in self.maps or any(mapped[n] for n in sources)
        if not all(mapped.get(t, False) for t in tails):  # type: ignore[arg-type]
            return None
        return frozenset({*mapped, *over} - {entry})

    def _owns(self, region: frozenset[fx.Node]) -> bool:
        """Whether some parameter is read there: without one there is nothing to remove."""
        params = (self.program.param(n) for node in region for n in node.all_input_nodes if n.op == "placeholder")
        return any(param is not None and param.kind == "parameter" for param in params)

    def _carries(self, node: fx.Node) -> bool:
        """Whether a node is a tensor, and no size of one."""
        return bool(self.program.types.get(node.name))

    def _block(self, entry: fx.Node, branches: Sequence[tuple[fx.Node, int]], region: frozenset[fx.Node]) -> Block:
        exit_ = branches[0][0]
        after = self._idempotent(entry, exit_)
        if after is not None:
            exit_, region = after, region | {after}
        mapping = [node for node in region if node in self.maps]
        block = Block(
            entry=entry,
            exit=exit_,
            branches=tuple(branches),
            region=region,
            path=common(_innermost(node) for node in mapping),
            attention=any(node in self.products for node in mapping),
        )
        return replace(block, reason=self._leaving(region, exit_) or self._writing(block))

    def _idempotent(self, entry: fx.Node, total: fx.Node) -> fx.Node | None:
        """The reader of the sum, where it does to the sum what was done to the entry already: relu(x + f(x))."""
        readers = list(total.users)
        # Applied twice these are what they are once, so a sum of nothing to one of their results changes nothing.
        if len(readers) != 1 or not (traits_of(readers[0]).idempotent and traits_of(entry).idempotent):
            return None
        after = readers[0]
        same = row_name(after.target) == row_name(entry.target) and after.args[1:] == entry.args[1:]
        return after if same and after.kwargs == entry.kwargs else None

    def _leaving(self, region: frozenset[fx.Node], exit_: fx.Node) -> str:
        """What leaves the region beside its exit, as a sentence; empty when nothing does."""
        if all(self.after.get(node) in region for node in region if node is not exit_):
            return ""
        for node in sorted(region - {exit_}, key=self.place.__getitem__):
            for user in self.readers.get(node, ()):
                if user not in region:
                    return f"%{node.name} leaves the block: %{user.name} = {op_name(user)} reads it"
        return "a value of the block is read nowhere"

    def _writing(self, block: Block) -> str:
        """What is written in place across the border of the block, as a sentence; empty when nothing is."""
        home, entry, exit_ = self.memory.home, block.entry, block.exit
        # Where the block adds to its stream in place, what is written later is written to the same stream without it.
        in_place = home[entry] is home[exit_]
        elsewhere = any(user not in block.region for user in entry.users)
        # Of nothing, a sum in place changes nothing.
        sums = {exit_, *(node for node, _ in block.branches)}
        for writer, target in self.memory.writes:
            said = f"%{writer.name} = {op_name(writer)} writes in place to"
            if writer in block.region:
                if writer not in sums and not self._private(home[target], block):
                    return f"{said} %{target.name}, from outside of the block"
            elif home[target] is home[entry] and not in_place and self.place[writer] > self.place[entry]:
                return f"{said} %{target.name}, which the block starts from"
            elif home[target] is home[exit_] and not in_place and elsewhere:
                return f"{said} what the block leaves, and others read what it starts from"
        return ""

    def _private(self, made: fx.Node, block: Block) -> bool:
        """Whether only the block reads what lies in a memory, up to where it ends."""
        last = self.place[block.exit]
        values = [node for node in self.shared[made] if self.place[node] < last]
        inside = {*values, *block.region}
        return made.op != "placeholder" and all(user in inside for value in values for user in value.users)


def unchanged(program: Program, node: fx.Node) -> bool:
    """Whether a call gives back its first operand as it is."""
    row = traits_of(node)
    source = node.args[0] if row.converts or row.drops else None
    if not isinstance(source, fx.Node) or program.type(node) != program.type(source):
        return False
    return not row.drops or node.args[2] is False


def dead_with(blocks: Iterable[Block]) -> set[fx.Node]:
    """Every node that nothing needs once the readers of each exit read its entry; placeholders among them."""
    removed = list(blocks)
    dead = {node for block in removed for node in block.region}
    needed = {block.entry for block in removed}
    stack = [source for node in dead for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in dead and node not in needed and all(user in dead for user in node.users):
            dead.add(node)
            stack += node.all_input_nodes
    return dead


def _post_dominators(sources: Mapping[fx.Node, Sequence[fx.Node]]) -> Mapping[fx.Node, Any]:
    """Each node's immediate post-dominator: the first node on all of its ways to the outputs."""
    flow: nx.DiGraph[Any] = nx.DiGraph()
    flow.add_node(_SINK)
    for node, read in sources.items():
        for source in read:
            flow.add_edge(_SINK if node.op == "output" else node, source)
    return nx.immediate_dominators(flow, _SINK)


def _innermost(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
