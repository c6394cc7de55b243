"""The dependency graph as a networkx graph, for people and for graph algorithms."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.nodes import module_path
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.ops.registry import op_name


@dataclass(frozen=True)
class DependencyGraph(Analysis["nx.MultiDiGraph[str]"]):
    """Nodes ``parameter:NAME``, ``group:NAME``, ``op:NAME`` and ``input:NAME``, each with an attribute ``kind``.

    Edges: a group to each parameter it slices (attributes ``dim``, ``units``); a parameter, an input or an op to each
    op that reads it. Groups carry ``axis`` (their kind), ``size``, ``prunable`` and ``reason``; ops ``target`` and
    ``module``; parameters ``shape`` and ``dims``, their axis expressions as text.
    """

    requires = (FindGroups,)

    def run(self, program: Program, analyses: AnalysisManager) -> nx.MultiDiGraph[str]:
        """Linear in the number of nodes and slices."""
        groups = analyses.get(FindGroups())
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(name=program.owner)
        names: dict[str, str] = {}
        for node in program.nodes:
            param = program.param(node)
            if param is not None:
                dims = [groups.show(d) for d in groups.axes.of_param[param.name]]
                names[node.name] = f"parameter:{param.name}"
                graph.add_node(names[node.name], kind=param.kind, shape=param.type.shape, dims=dims)
            elif node.op == "placeholder":
                names[node.name] = f"input:{node.name}"
                graph.add_node(names[node.name], kind="input")
            elif node.op == "call_function":
                names[node.name] = f"op:{node.name}"
                graph.add_node(names[node.name], kind="op", target=op_name(node), module=module_path(node))
            for source in node.all_input_nodes if node.name in names else ():
                graph.add_edge(names[source.name], names[node.name], kind="reads")
        for group in groups:
            name = f"group:{group.name}"
            graph.add_node(
                name, kind="group", axis=group.kind, size=group.size, prunable=group.prunable, reason=group.reason
            )
            for piece in group.slices:
                target = f"parameter:{piece.parameter}"
                graph.add_edge(name, target, key=piece.dim, kind="slices", dim=piece.dim, units=group.size)
        return graph
