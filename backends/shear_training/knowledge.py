"""Knowledge distribution: how much the loss grows when one group alone is pruned (LoRAShear, section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from shear_ir.errors import PlanError
from shear_ir.reading import Unreadable, document_in
from shear_ir.writing import write_text
from shear_passes.analysis.find_groups import Group, Groups
from shear_training.saliency import saliency
from shear_training.units import Units

RATIOS = (0.25, 0.5, 0.75)
KINDS = ("ffn", "kv_head")

Progress = Callable[[int, int], None]
"""Called with the evaluations that are done and their number."""


@dataclass(frozen=True)
class Sensitivity:
    """One group pruned alone. ``deviations``: by ratio, the growth of the mean NLL in nats per token."""

    group: str
    kind: str
    module: str
    size: int
    deviations: tuple[float, ...]
    frozen: bool = False

    @property
    def mean(self) -> float:
        """The mean over the ratios; infinite where one is not a number."""
        finite = all(map(math.isfinite, self.deviations))
        return sum(self.deviations) / len(self.deviations) if finite else math.inf


@dataclass(frozen=True)
class Knowledge:
    """The groups in graph order with their deviations; ``loss``: mean NLL of the whole model in nats per token.

    ``share``: of the candidates, how many are frozen; ``digest``: of the model's shapes.
    """

    digest: str
    loss: float
    ratios: tuple[float, ...]
    share: float
    groups: tuple[Sensitivity, ...]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the groups that are to be left whole."""
        return tuple(g.group for g in self.groups if g.frozen)

    @property
    def curves(self) -> dict[str, dict[float, float]]:
        """Group name to the deviation at each share of its units, in nats per token."""
        return {g.group: dict(zip(self.ratios, g.deviations, strict=True)) for g in self.groups}

    def require(self, digest: str) -> None:
        """Raise ``PlanError`` unless it was measured on a model of this shape digest."""
        if digest != self.digest:
            raise PlanError(f"the knowledge was measured on another model: its digest is {self.digest}, not {digest}")

    def ranked(self) -> list[Sensitivity]:
        """The most sensitive first; ties in graph order."""
        return sorted(self.groups, key=lambda g: -g.mean)

    def with_share(self, share: float) -> Knowledge:
        """The same measurements with another share frozen; raises ``PlanError`` for a share outside 0 to 1."""
        return _frozen(self.digest, self.loss, self.ratios, share, self.groups)

    def to_json(self) -> str:
        """As JSON text; infinite deviations are null."""
        return _Document(
            format="shear-ir knowledge 1", digest=self.digest, loss=self.loss, ratios=list(self.ratios),
            share=self.share,
            groups=[
                _Entry(
                    group=g.group, kind=g.kind, module=g.module, size=g.size, frozen=g.frozen,
                    deviations=[d if math.isfinite(d) else None for d in g.deviations],
                )
                for g in self.groups
            ],
        ).model_dump_json(indent=1)  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Knowledge:
        """Read what ``save`` wrote; raises ``PlanError``."""
        try:
            read = document_in(Path(path), _Document)
        except Unreadable as failure:
            raise PlanError(f"{path} is no knowledge file: {failure}") from failure
        entries = tuple(
            Sensitivity(
                e.group, e.kind, e.module, e.size, tuple(math.inf if d is None else d for d in e.deviations), e.frozen
            )
            for e in read.groups
        )
        return cls(read.digest, read.loss, tuple(read.ratios), read.share, entries)

    def save(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all."""
        write_text(Path(path), self.to_json())


def measure_knowledge(
    model: nn.Module, groups: Groups, loss: Callable[[nn.Module], float], *,
    kinds: Sequence[str] = KINDS, ratios: Sequence[float] = RATIOS, share: float = 0.1,
    progress: Progress | None = None, resume: Path | None = None, keeps: bool = True,
) -> Knowledge:  # fmt: skip
    """Prune each prunable group alone at each ratio, by masks in place, and measure the growth of ``loss``.

    ``loss``: mean NLL of a model in nats per token. The least salient (magnitude) units of a group are the ones
    tried, at least one and never all. Every weight is put back bit for bit. ``resume``: a file that keeps what is
    measured, read when it is there; of several processes only one ``keeps`` it. Raises ``PlanError`` when nothing can
    be pruned or a ratio or share is no share.
    """
    for ratio in ratios:
        if not 0.0 < ratio < 1.0:
            raise PlanError(f"a ratio is a share of a group between 0 and 1, not {ratio}")
    tried = candidates(groups, kinds)
    if not tried:
        raise PlanError(f"the model has no prunable group of the kinds {', '.join(kinds)}")
    digest = groups.program.digest
    known = _resumed(resume, digest, tuple(ratios))
    total = 1 + len(tried) * len(ratios)
    full = known.loss if known else loss(model)
    if not math.isfinite(full):
        raise PlanError(f"the loss of the whole model is {full}: its deviations would say nothing")
    done = {g.group: g for g in known.groups} if known else {}
    for number, group in enumerate(tried):
        if progress is not None:
            progress(1 + number * len(ratios), total)
        if group.name not in done:
            done[group.name] = _measure(model, group, loss, full, ratios)
            if resume is not None and keeps:
                Knowledge(digest, full, tuple(ratios), 0.0, tuple(done.values())).save(resume)
    if progress is not None:
        progress(total, total)
    return _frozen(digest, full, tuple(ratios), share, tuple(done[g.name] for g in tried))


def candidates(groups: Groups, kinds: Sequence[str] = KINDS) -> list[Group]:
    """The groups whose knowledge is measured, in graph order."""
    return [g for g in groups if g.prunable and g.kind in kinds and g.size > 1]


def frozen_count(share: float, measured: int) -> int:
    """Of so many measured groups, how many stay whole."""
    return round(share * measured)


def _measure(
    model: nn.Module, group: Group, loss: Callable[[nn.Module], float], full: float, ratios: Sequence[float]
) -> Sensitivity:
    units = Units(model, [group])
    order = torch.argsort(saliency(units, {"magnitude": 1.0}).cpu(), stable=True)
    deviations = []
    for ratio in ratios:
        gone = torch.zeros(group.size, dtype=torch.bool)
        gone[order[: min(group.size - 1, max(1, round(ratio * group.size)))]] = True
        with units.masked(gone):
            deviation = loss(model) - full
        deviations.append(deviation if math.isfinite(deviation) else math.inf)
    return Sensitivity(group.name, group.kind, group.module, group.size, tuple(deviations))


def _frozen(
    digest: str, loss: float, ratios: tuple[float, ...], share: float, groups: tuple[Sensitivity, ...]
) -> Knowledge:
    if not 0.0 <= share <= 1.0:
        raise PlanError(f"the share of groups to freeze is between 0 and 1, not {share}")
    worst = sorted(range(len(groups)), key=lambda i: -groups[i].mean)[: frozen_count(share, len(groups))]
    marked = tuple(
        Sensitivity(g.group, g.kind, g.module, g.size, g.deviations, i in worst) for i, g in enumerate(groups)
    )
    return Knowledge(digest, loss, ratios, share, marked)


def _resumed(path: Path | None, digest: str, ratios: tuple[float, ...]) -> Knowledge | None:
    if path is None or not path.is_file():
        return None
    known = Knowledge.load(path)
    return known if (known.digest, known.ratios) == (digest, ratios) else None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


_Share = Annotated[float, Field(gt=0, lt=1)]


class _Entry(_Strict):
    group: str
    kind: str
    module: str
    size: Annotated[int, Field(ge=1)]
    deviations: list[float | None]
    frozen: bool


class _Document(_Strict):
    format: Literal["shear-ir knowledge 1"]
    digest: str
    loss: float
    ratios: Annotated[list[_Share], Field(min_length=1)]
    share: Annotated[float, Field(ge=0, le=1)]
    groups: list[_Entry]

    @model_validator(mode="after")
    def _a_deviation_for_each_ratio(self) -> _Document:
        for entry in self.groups:
            if len(entry.deviations) != len(self.ratios):
                raise ValueError(f"{entry.group} has {len(entry.deviations)} deviations at {len(self.ratios)} ratios")
        if len(set(self.ratios)) < len(self.ratios):
            raise ValueError("a ratio occurs twice")
        if len({entry.group for entry in self.groups}) < len(self.groups):
            raise ValueError("a group occurs twice")
        return self
