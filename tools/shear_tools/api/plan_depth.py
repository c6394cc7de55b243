"""Plans in which whole blocks go, and beside them widths of what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from shear_backends.module.depth import without_layers
from shear_ir.errors import ShearingError
from shear_ir.frontend.base import has_adapters
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.block_groups import BLOCK_KINDS
from shear_passes.analysis.find_groups import Groups
from shear_passes.importance.scoring import chosen, prepared
from shear_passes.rewrite.cuts import checked
from shear_passes.rewrite.shear import shear_program, shear_tensors
from shear_passes.select import SelectBlocks, Selection
from shear_passes.select.choose import choose
from shear_tools.api.ask import Ask, Given
from shear_tools.api.pipeline import analyses, groups, model_of, of_model


def plan_depth(program: Program, ask: Ask, given: Given, plan_widths: Callable[[Program, Ask, Given], Plan]) -> Plan:
    """The blocks that go, and where that is less than asked, a plan of widths for what they leave."""
    given = given.listed()  # depth and width each read it
    wanted = ask.block_importance or (None if ask.wide else ask.importance)
    criterion = chosen(wanted or ("order" if given.data is None else "block-influence"), program, given.data, ask.seed)
    deep = SelectBlocks(
        ratio=_share(ask.ratio, ask.wide), blocks=ask.blocks, importance=criterion, seed=ask.seed, budget=ask.counted,
        floor=ask.floor, kinds=tuple(kind for kind in ask.kinds if kind in BLOCK_KINDS), only=ask.only, skip=ask.skip,
        frozen=ask.frozen,
    )  # fmt: skip
    manager = prepared(
        analyses(program), [] if ask.blocks else [criterion], weights=given.weights or analyses(program).weights,
        model=model_of(program), data=given.data, loss=given.loss, progress=given.progress, without=(Selection,),
    )  # fmt: skip
    found = manager.get(deep)
    gone = 1.0 - getattr(found.after, ask.counted) / max(1, getattr(found.before, ask.counted))
    if ask.ratio is None or not ask.wide or gone >= ask.ratio:
        return found
    held = _held(groups(program), found, ask)
    rest = ask.of_widths((ask.ratio - gone) / (1 - gone), held)
    return _then_widths(program, found, lambda left, more: plan_widths(left, rest, more), given)


def _share(ratio: float | None, wide: Sequence[str]) -> float:
    """The part of ``ratio`` that blocks take: all of it, or as much as the widths of what they leave."""
    if ratio is None or not 0.0 < ratio < 1.0:
        return 0.5 if ratio is None else ratio
    return 1.0 - math.sqrt(1.0 - ratio) if wide else ratio


def _held(found: Groups, depth: Plan, ask: Ask) -> list[str]:
    """Groups of the kinds that patterns and names leave whole, by the names they have without the blocks."""
    able = {g.name for g in choose(found, ask.only, ask.skip, ask.wide, ask.frozen)}
    small = found.names_without(checked(found, depth).gone)
    return [name for name, own in small.items() if found.by_name[own].kind in ask.wide and own not in able]


def _then_widths(program: Program, depth: Plan, widths: Callable[[Program, Given], Plan], given: Given) -> Plan:
    """``depth`` joined with a plan for the program it leaves."""
    found, model = groups(program), model_of(program)
    rest, given = shear_program(found, depth), replace(given, weights=None)
    left = _without_layers(model, found, depth)
    if left is not None:
        return depth.then(widths(of_model(rest, left), given))
    weights = analyses(program).weights
    cut = None if weights is None else shear_tensors(weights, found, depth)
    return depth.then(widths(rest, replace(given, weights=cut)))


def _without_layers(model: nn.Module | None, found: Groups, depth: Plan) -> nn.Module | None:
    """The modules that a plan of whole layers leaves; None where modules cannot say it."""
    if model is None or has_adapters(model) or not all(unit.whole for unit in found.units(depth.cuts)):
        return None
    try:
        return without_layers(model, depth)[0]
    except ShearingError:
        return None
