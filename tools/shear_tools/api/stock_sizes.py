"""Numbers of units that a config of the model's class can say, where those of a plan are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shear_backends.module.stock import Answer, Fixed, Stock, UnitCounts, classes, nearest
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.select import SelectByRatio
from shear_tools.api.pipeline import groups, model_of


def with_config(program: Program, manager: AnalysisManager, asked: SelectByRatio, found: Plan) -> Plan:
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

    def solve(fixed: Fixed) -> UnitCounts:
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


def _imbalance(asked: SelectByRatio, counts: UnitCounts) -> float:
    """How unlike the shares are that the kinds lose."""
    lost: dict[str, float] = dict.fromkeys(asked.kinds, 0.0)
    for group, count in counts.items():
        lost[group.kind] = max(lost[group.kind], 1 - count / group.size)
    return max(lost.values()) - min(lost.values())
