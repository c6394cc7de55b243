"""What goes: criteria and their scores, and plans by ratio, budget, allocation and depth, out of traced programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from shear_ir.errors import PlanError
from shear_ir.plans import Costs, Plan
from shear_ir.program import Program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance import Magnitude, Scores
from shear_passes.importance.calibration import LossFunction, Progress
from shear_passes.importance.scoring import CriterionLike, chosen, prepared
from shear_passes.select import SelectByRatio, selection
from shear_passes.select.by_ratio import Budget
from shear_passes.select.choose import DEFAULT_KINDS
from shear_tools.api.ask import Ask, Given, RoundTo, tuple_of
from shear_tools.api.pipeline import analyses, model_of
from shear_tools.api.plan_depth import plan_depth
from shear_tools.api.plan_latency import MeasuredScores, plan_latency
from shear_tools.api.stock_sizes import with_config


def plan(
    program: Program,
    *,
    ratio: float | None = None,
    blocks: Sequence[str] = (),
    importance: CriterionLike | None = None,
    block_importance: CriterionLike | None = None,
    data: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    progress: Progress | None = None,
    allocation: str = "uniform",
    budget: Budget | Literal["latency"] = "parameters",
    round_to: RoundTo = 1,
    floor: float = 0.0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    kinds: Sequence[str] = DEFAULT_KINDS,
    seed: int = 0,
    stock: bool = True,
    frozen: Sequence[str] = (),
    knowledge: Mapping[str, Mapping[float, float]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Plan:
    """What goes when ``ratio`` of the model's parameters, or other ``budget``, shall go.

    ``kinds``: with ``block`` among them whole layers go; beside other kinds, depth and width shrink by equal factors.
    ``blocks``: globs on the paths of the blocks that go, whatever their scores; with a ratio, the other kinds make up
    for the rest. ``block_importance``: which blocks matter; ``importance`` where only blocks go, and else block
    influence with data, and without any the order: the deepest first, but for the last.
    ``importance``: which units matter: a name, an object with options such as ``Taylor(order=2)``, or a function of
    your own; see ``shear_passes.importance``. ``data``: batches of model inputs, mappings or tensors, for criteria
    that look at data; ``loss``: of outputs and batch, where the model gives none. ``progress``: called with batches
    done and their number.
    ``budget``: what ``ratio`` is a share of: parameters, bytes, flops, kv_bytes of a generated token, or the latency of
    a forward pass, measured here in turns with the dense model, on the first batches of ``data`` or example inputs;
    ``Plan.options`` says what was measured. ``allocation``: how layers share it: uniform (one config can describe the
    result), global, isomorphic, or by-knowledge, which needs ``knowledge``: group name to the loss deviation at some
    shares of its units. The classes of ``shear_passes.select`` describe these and the other options; ``round_to`` may
    differ by kind.
    ``stock``: where no config of a transformers model has the sizes that would be left (Llama: heads must divide the
    hidden size), take numbers of units beside them that one has, and let the other kinds make up for it;
    ``Plan.notes`` says so, or what stands in the way. Only uniform allocation gives sizes that one config can say.
    ``frozen``: names of groups that stay whole. ``weights``: tensors by name, those of the traced model when None.
    Raises ``PlanError`` when the ratio cannot be reached, a pattern matches nothing, or nothing would be removed.
    """
    if not isinstance(program, Program):
        raise TypeError(f"a plan is made for a Program, which trace(model) gives, not for a {type(program).__name__}")
    ask = Ask(
        ratio=ratio, blocks=tuple_of(blocks), importance=importance, block_importance=block_importance,
        allocation=allocation, budget=budget, round_to=round_to, floor=floor, only=tuple_of(only), skip=tuple_of(skip),
        kinds=tuple_of(kinds), seed=seed, stock=stock, frozen=tuple_of(frozen), knowledge=knowledge,
    )  # fmt: skip
    if ask.wide or not ask.deep:  # here, where a warning names the user's line
        ask = replace(ask, importance=chosen(importance, program, data, seed))
    return planned(program, ask, Given(data=data, loss=loss, progress=progress, weights=weights))


def planned(program: Program, ask: Ask, given: Given) -> Plan:
    """The plan that ``ask`` asks for; raises ``PlanError``."""
    if ask.budget == "latency":
        given = given.listed()
        share = replace(ask, budget="parameters")
        if not ask.deep:
            criterion = chosen(ask.importance, program, given.data, ask.seed)
            (found,) = scores(
                program, criterion, data=given.data, loss=given.loss, progress=given.progress, seed=ask.seed
            ).values()
            share = replace(share, importance=MeasuredScores(str(criterion), found))
            return plan_latency(program, share, given, lambda each: planned(program, each, replace(given, data=None)))
        return plan_latency(program, share, given, lambda each: planned(program, each, given))
    return plan_depth(program, ask, given, plan_widths) if ask.deep else plan_widths(program, ask, given)


def plan_widths(program: Program, ask: Ask, given: Given) -> Plan:
    """The plan in which groups of axes lose units; raises ``PlanError``."""
    criterion = chosen(ask.importance, program, given.data, ask.seed)
    select = selection(
        ask.allocation, ask.knowledge, ratio=ask.ratio, importance=criterion, round_to=ask.steps, only=ask.only,
        skip=ask.skip, kinds=ask.kinds, seed=ask.seed, frozen=ask.frozen, budget=ask.counted, floor=ask.floor,
    )  # fmt: skip
    manager = analyses(program)
    manager.get(FindGroups())
    weights = manager.weights if given.weights is None else given.weights
    if weights is None and isinstance(criterion, Magnitude):
        raise PlanError("the model of this program is gone: pass weights={name: tensor}, or importance='order'")
    fork = prepared(
        manager, [criterion], weights=weights, model=model_of(program), data=given.data, loss=given.loss,
        progress=given.progress, without=(SelectByRatio,),
    )  # fmt: skip
    found = fork.get(select)
    return with_config(program, fork, select, found) if ask.stock and ask.allocation == "uniform" else found


def scores(
    program: Program,
    *importance: CriterionLike,
    data: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, Scores]:
    """The scores of several criteria, measured in one pass over ``data``: name, or object as text, to group to array.

    The least important unit of a group has its lowest score. Arguments are those of ``plan``. Raises ``PlanError``.
    """
    made = [(wanted, chosen(wanted, program, data, seed)) for wanted in importance or (None,)]
    criteria = {wanted if isinstance(wanted, str) else str(criterion): criterion for wanted, criterion in made}
    manager = analyses(program)
    manager.get(FindGroups())
    fork = prepared(
        manager, list(criteria.values()), weights=manager.weights, model=model_of(program), data=data, loss=loss,
        progress=progress,
    )  # fmt: skip
    return {name: fork.get(criterion) for name, criterion in criteria.items()}


def dense_costs(program: Program) -> Costs:
    """What ``program`` takes as it is."""
    return analyses(program).get(MeasureCosts()).now
