"""Recurrent layers: LSTM, GRU and plain ones, kept whole by the exporter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from shear_ir.axes import Dim, Dims, concat
from shear_passes.ops.registry import Results, Site, rule

aten = torch.ops.aten

_LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
_GATES: dict[Any, int] = {
    target: gates for row in (_LAYERS, _CELLS) for target, gates in zip(row, (4, 3, 1, 1), strict=True)
}


@rule(*_CELLS)
def cell(site: Site, x: Dims, states: Any, *tensors: Dims | None) -> Dims | Results:
    """One step of a recurrent layer."""
    states = list(states) if isinstance(states, list) else [states]
    hidden = states[0][-1]
    for state in states:
        for mine, other in zip(state, (*x[:-1], hidden), strict=True):
            site.equate(mine, other)
    nodes: Any = site.node.args[2:4]
    _cell(site, x[-1], hidden, [tensor for tensor in tensors if tensor is not None], nodes)
    results: Results = [(*x[:-1], hidden) for _ in states]
    return results if len(results) > 1 else results[0]


@rule(*_LAYERS)
def recurrent(
    site: Site,
    x: Dims,
    states: Any,
    weights: Sequence[Dims],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    both_ways: bool,
    batch_first: bool,
) -> Results:
    """``h[t] = f(x[t] w_ih + b_ih, h[t-1] w_hh + b_hh)``, the rows of each gate laid end to end.

    Unit i owns row i of every gate, column i of ``w_hh`` and entry i of the state. All layers and both directions
    lie in one tensor of states ``[layers * directions, batch, hidden]`` and so have one hidden axis; a layer behind
    the first reads ``hidden`` for each direction. No entry of the result is said to be zero: a state may decay.
    """
    states = list(states) if isinstance(states, list) else [states]
    ways, each = (2 if both_ways else 1), (4 if biases else 2)
    if len(weights) != layers * ways * each:
        return site.barrier("a recurrent layer with a projection of its state")
    hidden = states[0][2]
    batch, time = (x[0], x[1]) if batch_first else (x[1], x[0])
    site.freeze([time, *(state[0] for state in states)], "states follow each other")
    for state in states:
        site.equate(state[1], batch)
        site.equate(state[2], hidden)
    nodes: Any = site.node.args[2]
    reads = x[2]
    for layer in range(layers):
        for way in range(ways):
            first = (layer * ways + way) * each
            _cell(site, reads, hidden, weights[first : first + each], nodes[first : first + 2])
        reads = concat([hidden] * ways)
    return [(*x[:2], reads), *((state[0], batch, hidden) for state in states)]


def _cell(site: Site, reads: Dim, hidden: Dim, tensors: Sequence[Dims], nodes: Sequence[fx.Node]) -> None:
    of_input, of_state = tensors[:2]
    gates = concat([hidden] * _GATES[site.node.target])
    for tensor in tensors:
        site.equate(tensor[0], gates)
    site.equate(of_input[1], reads)
    site.equate(of_state[1], hidden)
    site.contract([reads], [(nodes[0], of_input[:1])], inner=True)
    site.contract([hidden], [(nodes[1], of_state[:1])], inner=True)
