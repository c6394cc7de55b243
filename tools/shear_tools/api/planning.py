"""What goes: criteria and their scores, and plans by ratio, budget, allocation and depth, out of traced programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from shear_backends.latency import as_options, by_latency
from shear_backends.module.depth import without_layers
from shear_backends.module.stock import Answer, Counts, Fixed, Stock, classes, nearest
from shear_ir.errors import PlanError, ShearingError
from shear_ir.frontend.base import has_adapters
from shear_ir.frontend.feeds import inputs_of
from shear_ir.frontend.inputs import device_of
from shear_ir.frontend.unchanged import unchanged
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Costs, Plan
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BLOCK_KINDS
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.importance import Importance, Magnitude, Scores
from shear_passes.importance.calibration import Loss, Progress, as_feed
from shear_passes.importance.scoring import Wanted, chosen, prepared
from shear_passes.rewrite.cuts import removed_by
from shear_passes.rewrite.shear import shear_program, shear_tensors
from shear_passes.select import SelectBlocks, SelectByRatio, Selection, selection
from shear_passes.select.by_ratio import Budget
from shear_passes.select.choose import DEFAULT_KINDS, choose
from shear_tools.api.pipeline import analyses, groups, model_of, shear, stands_for

MEASURED = 2
"""Batches of data that a budget of latency is measured on."""


@dataclass(frozen=True, eq=False)
class Known(Importance):
    """Scores that were measured before, by the criterion ``called``."""

    called: str
    scores: Scores

    def __str__(self) -> str:
        return self.called

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """They are what they were."""
        return self.scores


def plan(
    program: Program,
    *,
    ratio: float | None = None,
    blocks: Sequence[str] = (),
    importance: Wanted | None = None,
    block_importance: Wanted | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
    allocation: str = "uniform",
    budget: Budget | Literal["latency"] = "parameters",
    round_to: int | Mapping[str, int] = 1,
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
    blocks, only, skip, kinds, frozen = (
        (names,) if isinstance(names, str) else tuple(names) for names in (blocks, only, skip, kinds, frozen)
    )
    if budget == "latency":
        if ratio is None:
            raise PlanError("a budget of latency needs a ratio, a share of it")
        data = None if data is None else list(data)
        within = partial(
            plan, program, blocks=blocks, block_importance=block_importance, data=data, loss=loss, progress=progress,
            allocation=allocation, round_to=round_to, floor=floor, only=only, skip=skip, kinds=kinds, seed=seed,
            stock=stock, frozen=frozen, knowledge=knowledge, weights=weights,
        )  # fmt: skip
        if not blocks and not any(kind in BLOCK_KINDS for kind in kinds):
            criterion = chosen(importance, program, data, seed)
            (known,) = scores(program, criterion, data=data, loss=loss, progress=progress, seed=seed).values()
            within, importance = partial(within, data=None), Known(str(criterion), known)
        return _by_latency(program, ratio, data, partial(within, importance=importance))
    if blocks or any(kind in BLOCK_KINDS for kind in kinds):
        data = None if data is None else list(data)  # depth and width each read it
        wide = [kind for kind in kinds if kind not in BLOCK_KINDS and ratio is not None]
        wanted = block_importance or (None if wide else importance) or ("order" if data is None else "block-influence")
        criterion = chosen(wanted, program, data, seed)
        deep = SelectBlocks(
            ratio=_share(ratio, wide), blocks=tuple(blocks), importance=criterion, seed=seed, budget=budget,
            floor=floor, kinds=tuple(kind for kind in kinds if kind in BLOCK_KINDS), only=tuple(only), skip=tuple(skip),
            frozen=tuple(frozen),
        )  # fmt: skip
        manager = prepared(
            analyses(program), [] if blocks else [criterion], weights=weights or analyses(program).weights,
            model=model_of(program), data=data, loss=loss, progress=progress, without=(Selection,),
        )  # fmt: skip
        widths = partial(
            plan, importance=importance, data=data, loss=loss, progress=progress, allocation=allocation, budget=budget,
            round_to=round_to, floor=floor, seed=seed, stock=stock, knowledge=knowledge,
        )  # fmt: skip
        found = manager.get(deep)
        gone = 1.0 - getattr(found.after, budget) / max(1, getattr(found.before, budget))
        if ratio is None or not wide or gone >= ratio:
            return found
        held = _held(groups(program), found, only, skip, wide, frozen)
        return _then_widths(program, found, partial(widths, ratio=(ratio - gone) / (1 - gone), kinds=wide, frozen=held))
    if ratio is None:
        raise PlanError("say how much goes: ratio, a share of the parameters, or blocks, the layers that go")
    criterion = chosen(importance, program, data, seed)
    asked = selection(
        allocation, knowledge, ratio=ratio, importance=criterion, round_to=_steps(round_to), only=tuple(only),
        skip=tuple(skip), kinds=tuple(kinds), seed=seed, frozen=tuple(frozen), budget=budget, floor=floor,
    )  # fmt: skip
    manager = analyses(program)
    manager.get(FindGroups())
    weights = manager.weights if weights is None else weights
    if weights is None and isinstance(criterion, Magnitude):
        raise PlanError("the model of this program is gone: pass weights={name: tensor}, or importance='order'")
    fork = prepared(
        manager, [criterion], weights=weights, model=model_of(program), data=data, loss=loss, progress=progress,
        without=(SelectByRatio,),
    )  # fmt: skip
    found = fork.get(asked)
    return _with_config(program, fork, asked, found) if stock and allocation == "uniform" else found


def scores(
    program: Program,
    *importance: Wanted,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
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


def _by_latency(
    program: Program, ratio: float, data: Sequence[Any] | None, within: Callable[..., Plan]
) -> Plan:  # fmt: skip
    """The plan that ``within`` makes for the share of the parameters that saves ``ratio`` of the latency."""
    model = model_of(program)
    if model is None or device_of(model).type == "meta":
        raise PlanError("a budget of latency is measured, and there are no weights to run: trace a model that has them")
    feeds = [as_feed(model, batch) for batch in data[:MEASURED]] if data else [inputs_of(model)]
    with unchanged(model):
        found = by_latency(ratio, lambda share: within(ratio=share), lambda each: shear(model, each), model, feeds)
    return as_options(found, ratio, feeds, bool(data), model)


def _share(ratio: float | None, wide: Sequence[str]) -> float:
    """The part of ``ratio`` that blocks take: all of it, or as much as the widths of what they leave."""
    if ratio is None or not 0.0 < ratio < 1.0:
        return 0.5 if ratio is None else ratio
    return 1.0 - math.sqrt(1.0 - ratio) if wide else ratio


def _held(
    found: Groups, depth: Plan, only: Sequence[str], skip: Sequence[str], kinds: Sequence[str], frozen: Sequence[str]
) -> list[str]:
    """Groups of these kinds that patterns and names leave whole, by the names they have without the blocks."""
    able = {g.name for g in choose(found, only, skip, kinds, frozen)}
    small = found.names_without(removed_by(found, depth))
    return [name for name, own in small.items() if found.by_name[own].kind in kinds and own not in able]


def _then_widths(program: Program, depth: Plan, widths: Callable[..., Plan]) -> Plan:
    """``depth`` joined with a plan for the program it leaves."""
    found, model = groups(program), model_of(program)
    rest = shear_program(found, depth)
    # Held until the end: programs do not keep their models alive.
    left = _without_layers(model, found, depth)
    if left is not None:
        stands_for(rest, left)
        return depth.then(widths(rest))
    weights = analyses(program).weights
    return depth.then(widths(rest, weights=None if weights is None else shear_tensors(weights, found, depth)))


def _without_layers(model: nn.Module | None, found: Groups, depth: Plan) -> nn.Module | None:
    """The modules that a plan of whole layers leaves; None where modules cannot say it."""
    if model is None or has_adapters(model) or not all(unit.whole for unit in found.units(depth.cuts)):
        return None
    try:
        return without_layers(model, depth)[0]
    except ShearingError:
        return None


def _with_config(program: Program, manager: AnalysisManager, asked: SelectByRatio, found: Plan) -> Plan:
    """``found``, or the plan beside it that a config of the model's class can say; its notes tell which and why."""
    model = model_of(program)
    if model is None or not hasattr(getattr(model, "config", None), "to_dict"):
        return found
    named = groups(program).by_name
    counts = {named[cut.group]: len(cut.kept) for cut in found.cuts}
    stock = Stock(model, groups(program))
    why = stock.why_not(counts)
    if not why:
        return found

    def having(fixed: Fixed) -> SelectByRatio:
        return replace(asked, units=tuple(f"{kind}={count}/{size}" for (kind, size), count in fixed.items()))

    def solve(fixed: Fixed) -> Counts:
        other = having(fixed)
        return manager.running(other, lambda: other.counts(manager))

    answers = nearest(stock, solve)
    # A kind for which the class has no number at all stays in the plan: it was asked for.
    able = stock.has_fields(counts)
    taken = [a for a in answers if able or all(count < size for (_, size), count in a.fixed.items())]
    plans = [(a, manager.get(having(a.fixed))) for a in taken]
    if not plans:
        return replace(found, notes=(*found.notes, _not_stock(why if answers else stock.last or why, answers)))
    best, plan = min(plans, key=lambda pair: (_missed(asked, pair[1]), _imbalance(asked, pair[0].counts)))
    missed = f"; {plan.ratio:.3g} of the parameters go then, not {asked.ratio:.3g}" if _missed(asked, plan) else ""
    return replace(plan, notes=(*plan.notes, _beside(best, classes(counts), why) + missed))


def _beside(answer: Answer, asked: Mapping[tuple[str, int], int], why: str) -> str:
    """How the sizes of ``answer`` differ from those that the ratio asked for, and why."""
    told = ", ".join(
        f"{count} of {size} {kind} units stay, not {asked.get((kind, size), size)}"
        for (kind, size), count in answer.fixed.items()
    )
    return f"{told}, so that a stock config can say it ({why}); stock=False (--no-stock) does not mind"


def _not_stock(why: str, answers: Sequence[Answer]) -> str:
    """That no config has the sizes, and which sizes have one."""
    near = " or ".join(
        ", ".join(f"{count} of {size} {kind} units" for (kind, size), count in classes(answer.counts).items())
        for answer in answers[:2]
    )
    return f"stock classes cannot load this ({why})" + (f"; they could with {near}" if near else "")


def _missed(asked: SelectByRatio, plan: Plan) -> int:
    """How far the plan is from the ratio, in percent."""
    before: int = getattr(plan.before, asked.budget)
    after: int = getattr(plan.after, asked.budget)
    return round(100 * abs(1.0 - after / max(1, before) - asked.ratio))


def _steps(round_to: int | Mapping[str, int]) -> int | tuple[str, ...]:
    """``round_to`` as the passes spell it."""
    if isinstance(round_to, Mapping):
        return tuple(f"{kind}={n}" for kind, n in round_to.items())
    if not isinstance(round_to, int):
        raise PlanError(f"round_to is a number of units, or one for each of some kinds, not {round_to}")
    return round_to


def _imbalance(asked: SelectByRatio, counts: Counts) -> float:
    """How unlike the shares are that the kinds lose."""
    lost: dict[str, float] = dict.fromkeys(asked.kinds, 0.0)
    for group, count in counts.items():
        lost[group.kind] = max(lost[group.kind], 1 - count / group.size)
    return max(lost.values()) - min(lost.values())
