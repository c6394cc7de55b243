"""The dense model whose removed blocks add zero: the reference for plans that remove blocks.

The traced graph of the dense model runs as it is, but for the operands that these blocks add to their sums: each is
zeros. Nothing is rewired, and every operator of the blocks still runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from shear_backends.graph.module import graph_module, named_tensors
from shear_backends.verify.never_routed import routing
from shear_ir.frontend.export import trace
from shear_ir.frontend.feeds import tensors_in
from shear_ir.frontend.inputs import Inputs
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Cut
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BLOCK_KINDS
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.rewrite.cuts import masks_of
from shear_passes.rewrite.raise_lora import raise_lora


def block_cuts(cuts: Sequence[Cut]) -> list[Cut]:
    """Those of ``cuts`` that remove blocks."""
    return [cut for cut in cuts if cut.kind in BLOCK_KINDS]


class MaskedBlocks:
    """``model`` with the blocks that ``cuts`` remove adding zero to their streams, traced once for each size of inputs.

    Raises ``PlanError`` where it is called when the model has no such blocks.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[Cut]) -> None:
        self.model = model
        self.cuts = cuts
        self._graphs: dict[tuple[Any, ...], fx.GraphModule] = {}

    def __call__(self, feed: Inputs) -> tuple[Tensor, ...]:
        """What it predicts."""
        return self.run(self.graph_of(feed), feed)

    def run(self, graph: fx.GraphModule, feed: Inputs) -> tuple[Tensor, ...]:
        """What ``graph``, made by ``graph_of``, predicts."""
        with routing(self.model):
            return tuple(graph(**feed))

    def graph_of(self, feed: Inputs) -> fx.GraphModule:
        """The graph for inputs of such sizes."""
        sizes = tuple((name, tuple(value.shape), value.dtype) for name, value in tensors_in(feed).items())
        if sizes not in self._graphs:
            self._graphs[sizes] = self._graph(feed)
        return self._graphs[sizes]

    def _graph(self, feed: Inputs) -> fx.GraphModule:
        program = raise_lora(trace(self.model, feed))
        groups = AnalysisManager(program).get(FindGroups())
        masks_of(groups, block_cuts(self.cuts))
        units = groups.units(self.cuts)
        branches = {(node, place) for unit in units for block in unit.blocks for node, place in block.branches}
        return graph_module(_silenced(program, branches), named_tensors(self.model))


def _silenced(program: Program, branches: set[tuple[fx.Node, int]]) -> Program:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        places = [place for place in (0, 1) if (node, place) in branches]
        zeros = [graph.call_function(torch.ops.aten.zeros_like.default, (_copy(node, place, env),)) for place in places]
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].name = node.name
        for place, zero in zip(places, zeros, strict=True):
            env[node].update_arg(place, zero)
    return replace(program, graph=graph)


def _copy(node: fx.Node, place: int, env: dict[fx.Node, fx.Node]) -> fx.Node:
    operand = node.args[place]
    assert isinstance(operand, fx.Node)
    return env[operand]
