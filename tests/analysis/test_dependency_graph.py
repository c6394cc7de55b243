"""The networkx view of a program."""

from __future__ import annotations

import networkx as nx
from torch import Tensor, nn

import shear_ir as sir


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 9)
        self.up = nn.Linear(5, 9, bias=False)
        self.down = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_group_points_at_every_parameter_it_slices_and_data_flows_to_the_output() -> None:
    program = sir.trace(GatedMLP())
    graph = sir.dependency_graph(program)
    sliced = {name for _, name in graph.out_edges("group:ffn")}
    assert sliced == {f"parameter:{n}" for n in ("gate.weight", "gate.bias", "up.weight", "down.weight")}
    assert graph.nodes["group:ffn"]["size"] == 9
    assert graph.edges["group:ffn", "parameter:down.weight", 1]["dim"] == 1
    last = [n for n, d in graph.nodes(data=True) if d["kind"] == "op" and not graph.out_degree(n)]
    assert len(last) == 1
    assert nx.has_path(graph, "input:x", last[0])
    assert nx.is_directed_acyclic_graph(graph)
