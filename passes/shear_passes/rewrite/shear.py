"""Shear: every tensor loses what the plan removes, and all shape constants follow their axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from shear_ir.axes import Axis, Dim, Dims, Indices, Mask, evaluate, mask
from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager, Rewrite
from shear_ir.plans import Kept, Plan
from shear_ir.program import Param, Program, TensorType
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.analysis.infer_axes import Axes
from shear_passes.ops.registry import entry_of
from shear_passes.ops.resizing import Resizing
from shear_passes.rewrite.cuts import Selection, checked
from shear_passes.rewrite.drop_blocks import left_of, moved_up, without_blocks
from shear_passes.rewrite.rescale_gains import gained


@dataclass(frozen=True)
class Shear(Rewrite):
    """Applies the latest selection, or the plan in the file ``plan``."""

    plan: str = ""

    requires = (FindGroups, Selection)

    def run(self, program: Program, analyses: AnalysisManager) -> Program:
        """Raises ``PlanError`` when there is no plan or the plan is for another model."""
        return shear_program(analyses.get(FindGroups()), self._plan(analyses))

    def carry(self, weights: Mapping[str, Tensor] | None, analyses: AnalysisManager) -> Mapping[str, Tensor] | None:
        """The weights, cut alike."""
        return None if weights is None else shear_tensors(weights, analyses.get(FindGroups()), self._plan(analyses))

    def _plan(self, analyses: AnalysisManager) -> Plan:
        plan = Plan.load(self.plan) if self.plan else analyses.latest(Selection)  # type: ignore[type-abstract]  # any selection
        if plan is None:
            raise PlanError("shear needs a plan: put a selection before it, or give it plan=FILE")
        return plan


def shear_program(groups: Groups, plan: Plan) -> Program:
    """The program with the plan applied; the verifier checks that it computes what its types say.

    Raises ``PlanError`` for a plan that was made for another model or that contradicts itself.
    """
    cut = checked(groups, plan)
    left = without_blocks(groups.program, groups.units(plan.cuts))
    return moved_up(_Rewriter(left, groups.axes, cut.masks).run(), cut.gone)


def shear_tensors(tensors: Mapping[str, Tensor], groups: Groups, plan: Plan) -> dict[str, Tensor]:
    """``tensors`` of the dense program as ``shear_program`` wants them: cut, and named as what is left is."""
    return left_of(cut_tensors(gained(tensors, plan.kept, plan.gains), plan.kept), checked(groups, plan).gone)


def cut_tensors(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """``tensors`` with the kept indices of each dim; tensors that lose nothing are passed on as they are."""
    return {name: cut_tensor(tensor, kept.get(name, {})) for name, tensor in tensors.items()}


def cut_tensor(tensor: Tensor, kept: Mapping[int, Indices]) -> Tensor:
    """``tensor`` with the kept indices of each dim of ``kept``, as a new contiguous tensor."""
    with torch.no_grad():
        for dim, indices in kept.items():
            tensor = tensor.index_select(dim, torch.from_numpy(np.asarray(indices)).to(tensor.device))
    return tensor


class _Rewriter:
    def __init__(self, program: Program, axes: Axes, masks: Mapping[Axis, Mask]) -> None:
        self.program = program
        self.axes = axes
        self.masks = masks
        self.counts = {atom: int(stays.sum()) for atom, stays in masks.items()}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.types: dict[str, tuple[TensorType, ...]] = {}
        self.of_placeholder: dict[str, str] = {}
        self.constants: dict[str, Tensor] = dict(program.constants)
        self.params: dict[str, Param] = {}
        self._sizes: dict[int, int] = {}
        self._first: fx.Node | None = None

    def run(self) -> Program:
        for node in self.program.nodes:
            copy = self.graph.node_copy(node, self.env.__getitem__)
            self.env[node] = copy
            if node.op == "placeholder":
                self._placeholder(node, copy)
            elif node.op == "call_function":
                self._call(node, copy)
        for name, tensor in self.program.constants.items():
            kept = {d: np.flatnonzero(mask(dim, self.masks)) for d, dim in enumerate(self.axes.of_param[name])
                    if self.size(dim) != dim.size}  # fmt: skip
            self.constants[name] = cut_tensor(tensor, kept)
        return replace(
            self.program, source=None, graph=self.graph, types=self.types, params=self.params,
            of_placeholder=self.of_placeholder, constants=self.constants,
        )  # fmt: skip

    def size(self, dim: Dim) -> int:
        """Size of a dim after the cut."""
        if id(dim) not in self._sizes:
            self._sizes[id(dim)] = evaluate(dim, lambda a: self.counts.get(a, a.size))
        return self._sizes[id(dim)]

    def _placeholder(self, node: fx.Node, copy: fx.Node) -> None:
        self._type(node, copy)
        param = self.program.param(node)
        if param is not None:
            self.of_placeholder[copy.name] = param.name
            self.params[param.name] = replace(param, type=self.types[copy.name][0])
        self._first = self._first or copy

    def _type(self, node: fx.Node, copy: fx.Node) -> None:
        old = self.program.types.get(node.name, ())
        results = self.axes.of_node.get(node.name, [])
        self.types[copy.name] = tuple(
            TensorType(tuple(self.size(d) for d in dims), kind.dtype) for kind, dims in zip(old, results, strict=True)
        ) if results else old  # fmt: skip

    def _call(self, node: fx.Node, copy: fx.Node) -> None:
        self._type(node, copy)
        entry = entry_of(node.target)
        if entry is None or entry.resize is None or not self._touched(node):
            return
        final = self.types[copy.name]
        change = Resizing(
            node=copy,
            graph=self.graph,
            outs=self.axes.of_node.get(node.name, []),
            argument_dims=lambda place: self._dims(node.args[place]),
            size=self.size,
            kept=lambda dim: mask(dim, self.masks),
            constant=lambda tensor: self._constant(tensor),
            result=copy,
            dtype=final[0].dtype if final else torch.float32,
        )
        entry.resize(change)
        if change.result is not copy:
            # The call itself has the type it computes; what was put after it has the type of the result.
            self.types[change.result.name] = final
            self.types[copy.name] = self._before(change, final)
            self.env[node] = change.result

    def _before(self, change: Resizing, final: tuple[TensorType, ...]) -> tuple[TensorType, ...]:
        if change.result.target is not torch.ops.aten.index_select.default:
            return final
        full = change.outs[0]
        return (TensorType(tuple(d.size for d in full), final[0].dtype),)

    def _touched(self, node: fx.Node) -> bool:
        dims = [d for n in (node, *node.all_input_nodes) for r in self.axes.of_node.get(n.name, []) for d in r]
        return any(self.size(d) != d.size for d in dims)

    def _dims(self, value: Any) -> Dims:
        return self.axes.dims(value) if isinstance(value, fx.Node) else ()

    def _constant(self, tensor: Tensor) -> fx.Node:
        name = f"kept_{sum(n.startswith('kept_') for n in self.constants)}"
        assert self._first is not None
        with self.graph.inserting_before(self._first):
            node = self.graph.placeholder(f"c_{name}")
        kind = TensorType(tuple(tensor.shape), tensor.dtype)
        self.types[node.name] = (kind,)
        self.of_placeholder[node.name] = name
        self.params[name] = Param(name, "constant", kind)
        self.constants[name] = tensor
        return node
