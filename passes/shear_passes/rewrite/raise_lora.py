"""Raising: a base map with its low-rank branches becomes one call of a composed operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from shear_ir.manager import AnalysisManager, Rewrite
from shear_ir.program import Program
from shear_passes.analysis.lora import Branch, Composed, FindLora, find_lora


@dataclass(frozen=True)
class RaiseLora(Rewrite):
    """Every adapter of the graph that a composed operator can stand for; the rest stays as it is."""

    requires = (FindLora,)

    def run(self, program: Program, analyses: AnalysisManager) -> Program:
        """Linear in the number of nodes; parameters, their order and the names of values stay."""
        return _raised(program, analyses.get(FindLora()))


def raise_lora(program: Program) -> Program:
    """``program`` with its adapters raised; itself where there are none to raise."""
    return _raised(program, find_lora(program))


def _raised(program: Program, found: tuple[Composed, ...]) -> Program:
    calls = {c.root: c for c in found if _can_stand(program, c)}
    if not calls:
        return program
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    live = _live(program, calls)
    for node in program.nodes:
        if node not in live:
            continue
        if node in calls:
            copies[node] = _call(graph, calls[node], copies)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = node.name
    return replace(program, graph=graph, types={n.name: program.types[n.name] for n in live if n.name in program.types})


def _can_stand(program: Program, made: Composed) -> bool:
    same = program.type(made.root) == program.type(made.base.node)
    return same and made.exclusive and not made.raised


def _live(program: Program, calls: Mapping[fx.Node, Composed]) -> set[fx.Node]:
    """Every node but what only served the calls that go."""
    gone = {node for c in calls.values() for node in c.inside} - calls.keys()
    gone |= {root for root in calls if not root.users}
    read = {c.base.x for c in calls.values()}
    live: set[fx.Node] = set()
    for node in reversed(program.nodes):
        served = bool(node.users) and all(user in gone or user in calls for user in node.users)
        if node in gone or (node.op == "call_function" and served and node not in read):
            gone.add(node)
        else:
            live.add(node)
    return live


def _call(graph: fx.Graph, made: Composed, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    base, branches = made.base, made.branches
    target = getattr(torch.ops.lora, base.kind).default
    tensors = {"embedding": (base.weight, base.x), "experts": (base.weight,)}
    args = [*tensors.get(base.kind, (base.x, base.weight, base.bias)), *base.options]
    kwargs: dict[str, Any] = {
        "A": [b.a for b in branches],
        "B": [b.b for b in branches],
        "scale": _all(branches, "scale"),
    }
    kwargs |= {"B_bias": _all(branches, "bias"), "dropout": _all(branches, "dropout")}
    kwargs |= {"magnitude": _all(branches, "magnitude"), "transposed": base.turned or None}
    return graph.call_function(
        target,
        fx.map_arg(tuple(args[: _length(args)]), copies.__getitem__),
        fx.map_arg({key: value for key, value in kwargs.items() if _says_something(value)}, copies.__getitem__),
    )


def _all(branches: Iterable[Branch], name: str) -> list[Any]:
    return [getattr(branch, name) for branch in branches]


def _length(args: list[Any]) -> int:
    """Without the Nones that arguments end with."""
    return max(place for place, value in enumerate(args, start=1) if value is not None)


def _says_something(value: Any) -> bool:
    return any(v is not None and v != 0.0 for v in value) if isinstance(value, list) else value is not None
