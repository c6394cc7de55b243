"""The module backend: the same class hierarchy with smaller layers: whatever knew the model still knows it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shear_backends import attributes
from shear_backends.attributes import Overrides, apply_attributes
from shear_backends.config_inference import infer_config
from shear_backends.gathers import Gather, find_gathers, install
from shear_backends.graph import graph_module, tensors_of
from shear_backends.verify import TOLERANCE, difference, evaluation, run
from shear_ir.errors import PlanError, ShearingError
from shear_ir.frontend.export import trace
from shear_ir.frontend.inputs import Inputs, as_inputs, example_inputs
from shear_ir.plans import Kept, Plan
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.rescale_norm import NormFix, norm_fixes
from shear_passes.rewrite.shear import cut_tensor, shear_program
from shear_passes.select.build import masks_of

RECORD = "shear_record"


@dataclass(frozen=True, eq=False)
class Record:
    """How a sheared model came about, kept on it as ``shear_record``: enough to build it again from its dense class.

    ``plan``: all cuts so far as one. ``config``: the dense model's config. ``attributes``, ``norms``, ``gathers``:
    what differs from the dense modules beside the tensors. ``stock``: whether the model's own config builds it.
    """

    plan: Plan
    config: dict[str, Any] | None
    stock: bool
    attributes: Overrides = field(default_factory=dict)
    norms: tuple[NormFix, ...] = ()
    gathers: tuple[Gather, ...] = ()


def shear_module(model: nn.Module, groups: Groups, plan: Plan, inputs: Any = None) -> nn.Module:
    """A new model of the same class with the plan applied; ``model`` is not changed and untouched tensors are shared.

    Raises ``PlanError`` for a plan of another model and ``ShearingError`` when no setting of the modules' attributes
    computes the sheared graph's function.
    """
    plan.require(groups.program.digest)
    _require_exact(model)
    masks = masks_of(groups, plan.cuts)
    feed = example_inputs(model) if inputs is None else as_inputs(model, inputs)
    judge = _Judge(model, groups, plan, feed)
    norms = tuple(norm_fixes(groups, masks))
    config = infer_config(model, groups, masks, plan.kept, norms).config
    if config is not None:
        small = build(model, plan.kept, norms=norms)
        _take_config(small, model, config)
        if judge.agrees(small):
            return _recorded(small, model, plan, Record(plan, _config_of(model), stock=True, norms=norms))
    gathers = tuple(find_gathers(model, groups, masks, feed))
    for overrides in attributes.candidates(model, groups, masks):
        small = build(model, plan.kept, overrides, norms, gathers)
        if judge.agrees(small):
            record = Record(plan, _config_of(model), False, overrides, norms, gathers)
            return _recorded(small, model, plan, record)
    raise ShearingError(
        f"no setting of {type(model).__name__}'s module attributes computes the sheared function"
        f"{judge.last}: use the graph backend, or other kinds"
    )


def build(
    model: nn.Module, kept: Kept, overrides: Overrides | None = None, norms: tuple[NormFix, ...] = (),
    gathers: tuple[Gather, ...] = (),
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` with cut tensors, attributes, norms and hooks set; tensors that lose nothing are shared."""
    tensors = tensors_of(model)
    fixes = {fix.parameter: fix for fix in norms}
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        if id(tensor) in memo:
            continue
        cut = cut_tensor(tensor, kept.get(name, {}))
        if name in fixes:
            cut = _rescaled(cut, fixes[name])
        if cut is not tensor and isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = cut
    small = copy.deepcopy(model, memo)
    apply_attributes(small, overrides or {})
    for fix in norms:
        _set_eps(small.get_submodule(fix.module), fix)
    install(small, list(gathers))
    return small


def _rescaled(weight: Tensor, fix: NormFix) -> Tensor:
    with torch.no_grad():
        return (weight + fix.offset) * math.sqrt(fix.factor) - fix.offset


def _set_eps(module: nn.Module, fix: NormFix) -> None:
    for name, value in vars(module).items():
        if isinstance(value, float) and value == fix.eps:
            setattr(module, name, value * fix.factor)


def _take_config(small: nn.Module, model: nn.Module, config: Any) -> None:
    """Give ``small`` the config, and its modules the integer attributes that modules built from it have."""
    with torch.device("meta"):
        dense, fresh = type(model)(copy.deepcopy(model.config)), type(model)(copy.deepcopy(config))
    before, after = dict(dense.named_modules()), dict(fresh.named_modules())
    for path, module in small.named_modules():
        if path not in after or path not in before:
            continue
        for name, value in vars(after[path]).items():
            old = vars(before[path]).get(name)
            if name.startswith("_") or isinstance(value, bool) or value == old:
                continue
            if isinstance(value, (int, tuple, list)) and isinstance(old, type(value)):
                setattr(module, name, value)
    small.config.__dict__.update(copy.deepcopy(config).__dict__)


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _recorded(small: nn.Module, model: nn.Module, plan: Plan, record: Record) -> nn.Module:
    """Attach the record, joined with that of earlier cuts."""
    first: Record | None = getattr(model, RECORD, None)
    if first is not None:
        merged = {path: dict(values) for path, values in first.attributes.items()}
        for path, values in record.attributes.items():
            merged.setdefault(path, {}).update(values)
        record = replace(
            record,
            plan=first.plan.then(plan),
            config=first.config,
            stock=first.stock and record.stock,
            attributes=merged,
            norms=(*first.norms, *record.norms),
            gathers=(*first.gathers, *record.gathers),
        )
    object.__setattr__(small, RECORD, record)
    return small


def _require_exact(model: nn.Module) -> None:
    kinds = {p.dtype for p in model.parameters()}
    packed = [k for k in kinds if not k.is_floating_point]
    if packed:
        raise PlanError(f"the model holds quantised parameters ({packed[0]}): shear the unquantised model")


class _Judge:
    """Compares candidates with the graph backend, which got its answer by another road."""

    def __init__(self, model: nn.Module, groups: Groups, plan: Plan, feed: Inputs) -> None:
        self.feed = feed
        self.groups = groups
        self.plan = plan
        self.program: Program = shear_program(groups, plan)
        self.meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        self.last = ""
        if not self.meta:
            named = tensors_of(model)
            owned = {p.name for p in self.program.params.values() if p.kind != "constant"}
            cut = {name: cut_tensor(named[name], plan.kept.get(name, {})) for name in owned}
            with torch.no_grad():
                self.expected = tuple(graph_module(self.program, cut)(**feed))
            self.scale = max([1.0, *(float(t.abs().max()) for t in self.expected if t.numel())])

    def agrees(self, small: nn.Module) -> bool:
        """Whether ``small`` computes the sheared graph's function; on the meta device, its graph."""
        try:
            if self.meta:
                return self._same_graph(small)
            with evaluation(small), torch.no_grad():
                gap = difference(self.expected, run(small, self.feed))
        except Exception as failure:  # a wrong attribute may fail anywhere in the model's own code
            self.last = f" ({type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''})"
            return False
        self.last = f" (outputs differ by {gap:.3g})"
        tolerance = TOLERANCE if self.expected[0].dtype in (torch.float32, torch.float64) else 0.05
        return gap <= tolerance * self.scale

    def _same_graph(self, small: nn.Module) -> bool:
        other = trace(small, self.feed)
        mine = [(str(n.target), self.program.types[n.name]) for n in self.program.calls()]
        return mine == [(str(n.target), other.types[n.name]) for n in other.calls()]
