"""Dead code: calls whose results nobody reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from shear_ir.manager import AnalysisManager, Rewrite
from shear_ir.program import Program


@dataclass(frozen=True)
class DeadCode(Rewrite):
    """Removes calls without readers, from the last to the first; calls that write in place stay."""

    def run(self, program: Program, analyses: AnalysisManager) -> Program:
        """Linear in the number of nodes."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        live = _live(program)
        for node in program.nodes:
            if node in live:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].name = node.name
        types = {n.name: program.types[n.name] for n in live if n.name in program.types}
        return replace(program, graph=graph, types=types)


def _live(program: Program) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node.op in ("placeholder", "output") or _writes(node) or any(user in live for user in node.users):
            live.add(node)
    return live


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
