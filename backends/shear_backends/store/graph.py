"""Folders of sheared graphs: the cut tensors, the plan, and the config of the dense model, which is traced again.

A graph is code that torch.export wrote for one version of torch, so no file holds it: who loads the folder builds the
dense model on the meta device, traces it, and applies the plan, which gives the graph that was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from shear_backends.graph.module import ShearedGraph, graph_module, named_tensors
from shear_backends.graph.record import GraphRecord
from shear_backends.module.shear import skeleton_of
from shear_backends.store.rebuild import put_tensor, stored_tensors
from shear_backends.store.record_file import PLAN_FILE, RecordDocument, write_record
from shear_backends.store.reread import apart
from shear_backends.verify.numbers import evaluation
from shear_ir.errors import LoadError, PlanError, SaveError, ShearError
from shear_ir.frontend.export import trace
from shear_ir.frontend.feeds import given_inputs
from shear_ir.frontend.load import load_model
from shear_ir.frontend.unchanged import copied
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.rewrite.raise_lora import raise_lora
from shear_passes.rewrite.shear import shear_program

GRAPHS = "graph"
"""A folder of its own, where stock code does not look: these are not the tensors of the class in the config."""


def write_graph(graph: ShearedGraph, folder: Path) -> None:
    """Write ``graph`` into ``folder`` and read it again; raises ``SaveError`` where that is not the same graph."""
    record = graph.record
    if record is None:
        raise SaveError("this graph was not made by shear_ir.shear, so nothing says what it was made of")
    if record.adapted:
        raise SaveError("a graph with adapters is not saved: shear the modules, or merge the adapters first")
    graph.require_written()
    tensors = named_tensors(graph)  # all buffers among them: a graph computes none of them anew
    if any(t.is_meta for t in tensors.values()):
        raise SaveError("this graph is on the meta device and has no weights to save")
    (folder / GRAPHS).mkdir()
    save_file(apart(tensors), folder / GRAPHS / "tensors.safetensors")
    if record.config is not None:
        config = deepcopy(record.config)
        config.architectures = [record.model_class]
        config.save_pretrained(folder)
    record.plan.save(folder / PLAN_FILE)
    document = RecordDocument(
        format="shear-ir record 1", backend="graph", model_class=record.model_class, stock=False, config=None,
        attributes={}, norms=(), gathers=(),
    )  # fmt: skip
    write_record(folder, document)
    _require_same(graph, load_graph(folder, document, record.skeleton, record.feed))


def load_graph(
    folder: Path, document: RecordDocument, model: nn.Module | None, feed: Mapping[str, Any] | None = None
) -> ShearedGraph:
    """The graph in ``folder``; ``model``: the dense model where its config cannot build it, on any device.

    ``feed``: the inputs to trace it with; those that it was last traced with, or examples, when None.

    Raises ``LoadError`` when the folder is damaged, ``PlanError`` when ``model`` is not the one that was sheared.
    """
    plan = Plan.load(folder / PLAN_FILE)
    if model is None and not (folder / "config.json").is_file():
        raise LoadError(
            f"{folder} holds a graph of {document.model_class}, which no config builds: give the dense model"
        )
    dense = load_model(str(folder), weights=False).model if model is None else model
    if type(dense).__name__ != document.model_class:
        raise PlanError(f"{folder} was made of a {document.model_class}, not of a {type(dense).__name__}")
    hollow, known = _hollow(dense), given_inputs(dense) if feed is None else feed
    program = raise_lora(trace(hollow, known, dynamic=True))
    groups = AnalysisManager(program).get(FindGroups())
    sheared = shear_program(groups, plan)
    tensors = stored_tensors(folder / GRAPHS)
    empty = {name: torch.empty(p.type.shape, dtype=p.type.dtype, device="meta") for name, p in sheared.params.items()}
    made = graph_module(sheared, empty)
    wanted = named_tensors(made)
    if wanted.keys() != tensors.keys() or any(wanted[n].shape != tensors[n].shape for n in wanted):
        raise LoadError(f"{folder / GRAPHS} does not hold the tensors that {PLAN_FILE} leaves")
    for name, old in wanted.items():
        tensor = tensors[name]
        put_tensor(made, [name], nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
    made.record = GraphRecord.of(hollow, plan, None if model is None else skeleton_of(model))
    made.eval()
    return made


def _hollow(model: nn.Module) -> nn.Module:
    """``model`` with tensors on the CPU, where a graph notes the devices of what it makes; nothing is written to those
    that were not there, so they take no memory."""
    away = {id(t): t for t in named_tensors(model).values() if t.device.type != "cpu"}
    if not away:
        return model
    empty = {key: torch.empty_like(t, device="cpu") for key, t in away.items()}
    made = {
        key: nn.Parameter(empty[key], t.requires_grad) if isinstance(t, nn.Parameter) else empty[key]
        for key, t in away.items()
    }
    return copied(model, made)


def _require_same(graph: ShearedGraph, again: ShearedGraph) -> None:
    """Raise ``SaveError`` unless both compute the same, bit for bit, on the inputs of the trace."""
    assert graph.record is not None
    feed = graph.record.feed
    try:
        with evaluation(graph), evaluation(again), torch.no_grad():
            pairs = zip(graph(**feed), again(**feed), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
    except ShearError as failure:
        raise SaveError(f"the graph that was written does not run: {failure}") from failure
    if not same:
        raise SaveError("the graph that was written does not compute what this one computes")
