"""Values that lie in the same memory: which calls write to which values, and who reads what was written."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from shear_ir.nodes import operands
from shear_ir.program import Program
from shear_passes.ops.traits import Layout, traits_of


@dataclass(frozen=True)
class Memory:
    """``home``: of each value, the one that made the memory that it may lie in. ``writes``: calls that write in place
    and the values they write to. ``sources``: what each node depends on, by its operands and by what was written to
    their memory before.
    """

    home: Mapping[fx.Node, fx.Node]
    writes: tuple[tuple[fx.Node, fx.Node], ...]
    sources: Mapping[fx.Node, list[fx.Node]]


def memory_of(program: Program) -> Memory:
    """One walk, linear in the number of nodes: of the calls that write to a memory each depends on the one before."""
    home: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    writes: list[tuple[fx.Node, fx.Node]] = []
    sources: dict[fx.Node, list[fx.Node]] = {}
    for node in program.nodes:
        read = node.all_input_nodes
        sources[node] = list(dict.fromkeys([*read, *(last[home[n]] for n in read if home[n] in last)]))
        home[node] = home[operands(node)[0]] if operands(node) and _may_share(node) else node
        for target in _targets(node):
            last[home[target]] = node
            writes.append((node, target))
    return Memory(home, tuple(writes), sources)


def undecided(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Calls that are a view or a copy as their operand lies in memory, where it matters: one of the two is written to
    in place before the other is read. With each the call that made the memory. The sizes that are left after a cut may
    choose another kernel, another layout and so another function.
    """
    memory = memory_of(program)
    if not memory.writes:
        return
    order = {node: place for place, node in enumerate(program.nodes)}
    sharing: dict[fx.Node, list[fx.Node]] = {memory.home[target]: [] for _, target in memory.writes}
    for node in order:
        if memory.home[node] in sharing:
            sharing[memory.home[node]].append(node)
    for home, nodes in sharing.items():
        writes = [(write, target) for write, target in memory.writes if memory.home[target] is home]
        for call in nodes:
            if (
                traits_of(call).layout is Layout.BY_STRIDES
                and call is not home
                and _matters(call, nodes, writes, order)
            ):
                yield call, home


def _matters(
    call: fx.Node, sharing: Sequence[fx.Node], writes: Sequence[tuple[fx.Node, fx.Node]], order: Mapping[fx.Node, int]
) -> bool:
    """Whether of the values made of ``call`` and the others in its memory, one side is read after the other changed."""
    below = {call}
    for node in sharing:
        if operands(node) and operands(node)[0] in below:
            below.add(node)
    return any(
        order[user] > order[write] > order[call]
        for write, target in writes
        for node in sharing
        if (node in below) != (target in below)
        for user in node.users
    )


def _may_share(node: fx.Node) -> bool:
    """Whether a value may lie in the memory of its first operand: a view, an item of views, or what may be no copy."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    shares = any(r.alias_info for r in node.target._schema.returns)
    return shares or traits_of(node).layout is not Layout.OWN


def _targets(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that a call writes to, as its schema says."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return
    for place, argument in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if argument.is_write and isinstance(value, fx.Node):
            yield value
