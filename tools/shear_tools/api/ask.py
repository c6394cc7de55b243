"""What is asked for: how much goes, of what, by which measure; and what there is to measure it with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from shear_ir.errors import PlanError
from shear_passes.analysis.block_groups import BLOCK_KINDS
from shear_passes.importance.calibration import LossFunction, Progress
from shear_passes.importance.scoring import CriterionLike
from shear_passes.select.by_ratio import BUDGETS, Budget
from shear_passes.select.choose import DEFAULT_KINDS

RoundTo = int | Mapping[str, int]
"""Of how many units the number that stays is a multiple, for all kinds or for each of some."""


def tuple_of(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The options of ``shear_ir.plan`` that say what goes. Raises ``PlanError`` where that is nothing."""

    ratio: float | None = None
    blocks: tuple[str, ...] = ()
    importance: CriterionLike | None = None
    block_importance: CriterionLike | None = None
    allocation: str = "uniform"
    budget: Budget | Literal["latency"] = "parameters"
    round_to: RoundTo = 1
    floor: float = 0.0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    kinds: tuple[str, ...] = DEFAULT_KINDS
    seed: int = 0
    stock: bool = True
    frozen: tuple[str, ...] = ()
    knowledge: Mapping[str, Mapping[float, float]] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.budget not in (*BUDGETS, "latency"):
            raise PlanError(f"there is no budget '{self.budget}'; there are {', '.join((*BUDGETS, 'latency'))}")
        if self.ratio is not None and not isinstance(self.ratio, int | float):
            raise PlanError(f"ratio is a number between 0 and 1, not {self.ratio!r}")
        if self.ratio is None and self.budget == "latency":
            raise PlanError("a budget of latency needs a ratio, a share of it")
        if self.ratio is None and not self.deep:
            raise PlanError("say how much goes: ratio, a share of the parameters, or blocks, the layers that go")

    @property
    def counted(self) -> Budget:
        """The budget of a plan that nothing is measured for."""
        return "parameters" if self.budget == "latency" else self.budget

    @property
    def deep(self) -> bool:
        """Whether whole blocks go."""
        return bool(self.blocks) or any(kind in BLOCK_KINDS for kind in self.kinds)

    @property
    def wide(self) -> tuple[str, ...]:
        """The kinds besides blocks that go where a ratio is asked for."""
        return tuple(kind for kind in self.kinds if kind not in BLOCK_KINDS and self.ratio is not None)

    @property
    def steps(self) -> int | tuple[str, ...]:
        """``round_to`` as the passes spell it."""
        if isinstance(self.round_to, Mapping):
            return tuple(f"{kind}={n}" for kind, n in self.round_to.items())
        if not isinstance(self.round_to, int):
            raise PlanError(f"round_to is a number of units, or one for each of some kinds, not {self.round_to}")
        return self.round_to

    def of_widths(self, ratio: float, frozen: Iterable[str]) -> Ask:
        """What is asked of the program that is left when blocks are gone: patterns were for the names before."""
        return replace(
            self, ratio=ratio, blocks=(), block_importance=None, kinds=self.wide, only=(), skip=(), frozen=tuple(frozen)
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """What there is to score by: see ``shear_ir.plan``."""

    data: Iterable[Any] | None = None
    loss: LossFunction | None = None
    progress: Progress | None = None
    weights: Mapping[str, Tensor] | None = None

    def listed(self) -> Given:
        """The same with data that can be read more than once."""
        return self if self.data is None else replace(self, data=list(self.data))
