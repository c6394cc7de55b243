"""The whole road: trace, analyse, select, shear, emit. The public functions of shear-ir are these."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import networkx as nx
import torch
from torch import Tensor, fx, nn

from shear_backends.graph.module import graph_module, named_tensors
from shear_backends.graph.record import GraphRecord
from shear_backends.module.adapted import gains_here, kept_here, merged, plan_of_base, routers_here, shear_adapted
from shear_backends.module.adapters import require_lora
from shear_backends.module.depth import shear_layers
from shear_backends.module.proof import by_structure
from shear_backends.module.shear import RECORD, Record, of_transformers, require_exact, shear_module, skeleton_of
from shear_backends.store import model as store
from shear_backends.store.model import Saved
from shear_backends.store.project import Projected, project_adapter
from shear_backends.verify.masked_blocks import block_cuts
from shear_backends.verify.numbers import Report, evaluation, run
from shear_backends.verify.numbers import verify as _verify
from shear_backends.verify.structure import Structure
from shear_ir.errors import PlanError, ShearError
from shear_ir.frontend.adapter_files import adapter_tensors, base_of
from shear_ir.frontend.base import base_view, has_adapters, plain_base, unwrapped
from shear_ir.frontend.export import trace as _trace
from shear_ir.frontend.feeds import alike, given_inputs, placed, remember
from shear_ir.frontend.inputs import Inputs, as_inputs, example_inputs
from shear_ir.frontend.load import load_model
from shear_ir.frontend.state import ModelState
from shear_ir.frontend.unchanged import unchanged
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import ModelSource, Program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.dependency_graph import DependencyGraph
from shear_passes.analysis.explain import Explain
from shear_passes.analysis.explanation import Explanation
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.rewrite.cuts import checked
from shear_passes.rewrite.drop_blocks import left_of
from shear_passes.rewrite.raise_lora import raise_lora
from shear_passes.rewrite.rescale_gains import gained
from shear_passes.rewrite.shear import cut_tensors, shear_program

_traced: weakref.WeakSet[Program] = weakref.WeakSet()
"""Programs that somebody holds, so that a model in the state it was traced in need not be traced again."""


def trace(model: nn.Module, inputs: Any = None, *, dynamic: bool = False) -> Program:
    """Trace ``model`` (nn.Module, PreTrainedModel or PeftModel; the meta device will do) into a Program.

    ``inputs``: forward arguments by name, each a tensor or any nesting of them; made from the signature and config
    when None. What is done with the model later uses them too, unless it is told otherwise. ``dynamic``: keep batch and
    length symbolic. Adapters are raised to composed operators. Raises ``TraceError``.
    """
    model = unwrapped(model)
    program = of_model(raise_lora(_trace(model, inputs, dynamic=dynamic, ways=True)), model)
    if inputs is not None:
        remember(model, as_inputs(model, inputs))
    return program


def of_model(program: Program, model: nn.Module) -> Program:
    """``program`` with ``model`` as its source."""
    found = replace(program, source=ModelSource(model, ModelState.of(model)))
    _traced.add(found)
    return found


def forget(program: Program) -> None:
    """Let go of the weights of a program whose analyses are still wanted."""
    if program.source is not None:
        program.source.forget()
    analyses(program)


def analyses(program: Program) -> AnalysisManager:
    """The analysis manager of ``program``, which keeps every result; it reads weights from the traced model."""
    # On the program itself, so that program and results go together when nobody holds them any more.
    manager: AnalysisManager = vars(program).setdefault("_analyses", AnalysisManager(program))
    model = model_of(program)
    manager.weights = None if model is None else named_tensors(model)
    return manager


def groups(program: Program) -> Groups:
    """Every axis of the parameters with the slices it owns; iterates in graph order."""
    return analyses(program).get(FindGroups())


def explain(program: Program, name: str) -> Explanation:
    """Why slices leave together, or cannot: ``name`` is a group, a parameter, or ``parameter:dim``.

    The shortest chains of operators and source lines, as an object that prints as text. Raises ``ShearError`` for a
    name that the program does not have.
    """
    return analyses(program).get(Explain(name))


def dependency_graph(program: Program) -> nx.MultiDiGraph[str]:
    """Parameters, groups and ops of ``program`` as a networkx graph."""
    return analyses(program).get(DependencyGraph())


def shear(
    model: nn.Module,
    plan: Plan,
    *,
    backend: str = "module",
    inputs: Any = None,
    merge: bool = False,
) -> nn.Module:
    """``model`` with the plan applied: the same class with smaller layers, or an ``fx.GraphModule``.

    What wraps a model (DataParallel, DistributedDataParallel, torch.compile) is taken off first.

    A PEFT model keeps its adapters, cut like their base; its plan may also be one that was made for its base alone.
    ``merge``: merge the active adapters (in fp32) and return a model of the base's class. ``model`` is left as it is
    and shares no tensor with the result. Raises ``PlanError`` for a plan of another model, ``ShearingError`` when the
    module backend cannot express the result, as for adapters other than LoRA and DoRA.
    """
    require_backend(backend, merge)
    if merge and not has_adapters(model):
        raise PlanError("there are no adapters to merge")
    model = unwrapped(model)
    given = given_inputs(model) if inputs is None else as_inputs(model, inputs)
    with unchanged(model):
        small = BACKENDS[backend](model, plan, given, merge)
    if given is not None:
        remember(small, given)
    return small


def _by_graph(model: nn.Module, plan: Plan, given: Inputs | None, merge: bool) -> nn.Module:
    found = groups(_program(model, given, dynamic=True))
    made = graph_module(shear_program(found, plan), _copies(model, found, plan))
    before: Record | None = vars(model).get(RECORD)
    by_config = of_transformers(model) and (before is None or before.stock)
    made.record = GraphRecord.of(model, plan, None if by_config else skeleton_of(model))
    return made


def _by_modules(model: nn.Module, plan: Plan, given: Inputs | None, merge: bool) -> nn.Module:
    if has_adapters(model):
        adapted = _shear_adapted(model, plan, given)
        return merged(adapted) if merge else adapted
    program = _program(model, given)
    _exchange(model, program)
    by_modules = shear_layers if block_cuts(plan.cuts) else shear_module
    return by_modules(model, groups(program), plan, _fed(program, model))


class Backend(Protocol):
    """Makes the smaller model: ``plan`` applied to ``model``, which runs on the inputs ``given`` or examples."""

    def __call__(self, model: nn.Module, plan: Plan, given: Inputs | None, merge: bool) -> nn.Module: ...


BACKENDS: Mapping[str, Backend] = {"module": _by_modules, "graph": _by_graph}
"""What ``shear(backend=...)`` and ``prune --backend`` take."""

_MERGES = ("module",)


def require_backend(name: str, merge: bool = False) -> None:
    """Raise ``PlanError`` for a backend that there is not, or that merges no adapters where they are to be merged."""
    if name not in BACKENDS:
        raise PlanError(f"there is no backend '{name}'; there are {' and '.join(BACKENDS)}")
    if merge and name not in _MERGES:
        raise PlanError(f"the {name} backend merges no adapters")


def _exchange(model: nn.Module, program: Program) -> None:
    """Let a model that exchanges modules of its own at its first inputs, as BigBird does at short ones, do so."""
    classes = {path: f"{type(m).__module__}.{type(m).__qualname__}" for path, m in model.named_modules()}
    if all(classes.get(path, made.type) == made.type for path, made in program.modules.items()):
        return
    with evaluation(model), torch.no_grad():
        run(model, _fed(program, model) or example_inputs(model))


def _fed(program: Program, model: nn.Module) -> Inputs | None:
    """The inputs of ``program``, for ``model`` as it is now."""
    return None if program.feed is None else placed(program.feed, model)


def verify(model: nn.Module, small: nn.Module, plan: Plan, inputs: Any = None, *, seed: int = 0) -> Report:
    """Compare ``small`` with ``model`` whose removed units are masked to zero, on at least two lengths.

    Beside these numbers, ``Report.structure`` says whether the program of ``small`` is the sheared one.
    """
    model, small = unwrapped(model), unwrapped(small)
    here = replace(plan, kept=kept_here(model, plan), routers=routers_here(model, plan), gains=gains_here(model, plan))
    with unchanged(model, small):
        given = given_inputs(model) if inputs is None else inputs
        more = inputs is None and given is not None
        report = _verify(model, small, here, given, seed=seed, more=more)
        return replace(report, structure=_structure(model, small, plan, inputs))


def _structure(model: nn.Module, small: nn.Module, plan: Plan, inputs: Any) -> Structure | None:
    """What the programs say; None for graphs, and for adapters on a base that alone was planned for."""
    if isinstance(small, fx.GraphModule):
        return None
    first = inputs[0] if isinstance(inputs, list) and inputs else inputs  # verify takes the inputs of several calls
    try:
        program = _program(model, first)
        if program.digest != plan.digest:
            return None
        return by_structure(model, groups(program), plan, small, _fed(program, model) or example_inputs(model))
    except ShearError as failure:
        return Structure(False, (), str(failure))


def planned_program(model: nn.Module, plan: Plan, inputs: Any = None) -> Program:
    """The program that ``plan`` was made for: that of ``model``, or for a PEFT model, that of its base alone.

    Raises ``PlanError`` when it is neither.
    """
    model = unwrapped(model)
    program = _program(model, inputs)
    if program.digest != plan.digest and has_adapters(model):
        base = trace(plain_base(model), given_inputs(model) if inputs is None else inputs)
        program = base if base.digest == plan.digest else program
    plan.require(program.digest)
    return program


def save(model: nn.Module, out: str | Path, *, source: str | Path | None = None, force: bool = False) -> Saved:
    """Write a sheared model; ``Saved.stock`` says whether stock transformers loads it with identical outputs."""
    model = unwrapped(model)
    with unchanged(model):
        return store.save(model, out, source=source, force=force)


def project(
    adapter: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    base: nn.Module | None = None,
    sheared: str | Path | None = None,
    force: bool = False,
) -> Projected:
    """Write the adapter in the folder ``adapter``, trained on the dense base, for the base that ``plan`` shears.

    ``base``: the dense base, as the adapter's config names it when None; its weights are neither needed nor read.
    ``sheared``: the folder of the sheared base. The result is a PEFT adapter folder with the digest of that base.
    Raises ``LoadError`` and ``PlanError`` when adapter, base and plan do not belong together, ``ShearingError`` for
    adapters other than LoRA and DoRA.
    """
    folder, at = Path(adapter), None if sheared is None else Path(sheared)
    adapter_tensors(folder)
    dense = load_model(base_of(folder), weights=False).model if base is None else base
    program = trace(dense)
    plan.require(program.digest)
    return project_adapter(folder, dense, groups(program), plan, Path(out), sheared=at, force=force)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read what ``save`` wrote; ``model``: the dense model, for classes that are not transformers' own."""
    return store.load(path, model)


def _shear_adapted(model: nn.Module, plan: Plan, inputs: Any) -> nn.Module:
    require_exact(model)
    require_lora(model)
    if block_cuts(plan.cuts):
        raise PlanError(
            "whole blocks of a model with adapters stay in its modules: use the graph backend, or plan for what PEFT's "
            "merge_and_unload makes of it"
        )
    base = plain_base(model)
    found = groups(trace(base, inputs))
    if plan.digest == found.program.digest:
        return shear_adapted(model, base, found, plan, plan, inputs)
    mine = groups(_program(model, inputs))
    plan.require(mine.program.digest)
    costs = analyses(found.program).get(MeasureCosts())
    of_base = plan_of_base(plan, mine, found, costs, base_view(model))
    return shear_adapted(model, base, found, of_base, plan, inputs)


def _copies(model: nn.Module, found: Groups, plan: Plan) -> dict[str, Tensor]:
    """The tensors of ``model``, cut, copied and renamed; parameters ask for gradients as the model's do."""
    tensors = named_tensors(model)
    cut = {
        name: tensor.detach().clone()
        for name, tensor in cut_tensors(gained(tensors, plan.kept, plan.gains), plan.kept).items()
    }
    wants = {name: t.requires_grad for name, t in tensors.items() if isinstance(t, nn.Parameter)}
    made = {name: nn.Parameter(t, wants[name]) if name in wants else t for name, t in cut.items()}
    return left_of(made, checked(found, plan).gone)


def model_of(program: Program) -> nn.Module | None:
    """The model that ``program`` was traced from; None for a rewritten one, and where it was let go."""
    return None if program.source is None else program.source.model


def _program(model: nn.Module, inputs: Any, dynamic: bool = False) -> Program:
    """The program of ``model``: the last one that was traced of it as it is now, with these inputs, or a new one."""
    wanted = given_inputs(model) if inputs is None else as_inputs(model, inputs)
    now = ModelState.of(model)
    for program in list(_traced):
        source = program.source
        if source is None or source.model is not model or program.dynamic != dynamic or source.state != now:
            continue
        if wanted is None or (program.feed is not None and alike(program.feed.values, wanted)):
            return program
    return trace(model, inputs, dynamic=dynamic)
