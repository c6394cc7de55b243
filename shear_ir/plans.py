"""Plan: which indices of which axes stay. Readable JSON, composable, and true of exactly one model's shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from shear_ir.axes import Indices
from shear_ir.errors import PlanError
from shear_ir.paths import last, parent
from shear_ir.reading import Unreadable, document_of, text_in
from shear_ir.writing import write_text

Kept = Mapping[str, Mapping[int, Indices]]
"""Parameter name to dim to the sorted indices that stay, for every tensor that shrinks."""


@dataclass(frozen=True)
class Costs:
    """What a model takes. ``flops``: for one token (one sample where there are no tokens), a multiply-add is two;
    ``kv_bytes``: keys and values kept per generated token, 0 for models without a cache."""

    parameters: int
    bytes: int
    flops: int
    kv_bytes: int


@dataclass(frozen=True, eq=False)
class Cut:
    """One group that loses units. ``kept``: sorted units that stay, shape ``(n,)``; ``reason``: why these."""

    group: str
    kind: str
    size: int
    kept: Indices
    module: str = ""
    reason: str = ""

    @property
    def removed(self) -> Indices:
        """Sorted units that go."""
        return np.setdiff1d(np.arange(self.size), self.kept)

    def __str__(self) -> str:
        return f"{self.group}: {len(self.kept)} of {self.size} {self.kind} units stay"


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes and what stays of one model, with what that saves.

    ``digest`` names the shapes of the model the plan was made for. ``gone``: modules of lists that leave as a whole;
    those behind them move up. ``names``: groups of what is left whose name changes by that, to the name they have
    here. ``frozen``: group name to why it was left alone. ``options``: how the plan was asked for. ``routers``:
    tensors that score the experts a plan removes, with the dim that counts them: a removed expert is one that is never
    routed to, not one whose weights are zero. ``gains``: parameters g of normalised weights ``g * v / |v|``, each with
    its v: where v loses what the norm runs over, g is scaled so that what is left of the weight stays what it is.
    ``notes``: sentences about how the plan differs from what was asked.
    """

    digest: str
    model: str
    cuts: tuple[Cut, ...]
    kept: Kept
    before: Costs
    after: Costs
    frozen: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    routers: Mapping[str, int] = field(default_factory=dict)
    gains: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Share of the parameters that is really removed, 0 to 1."""
        return 1.0 - self.after.parameters / self.before.parameters

    def require(self, digest: str) -> None:
        """Raise ``PlanError`` unless the plan was made for a model of this shape digest."""
        if digest != self.digest:
            raise PlanError(
                f"the plan was made for another model: its tensors have the digest {self.digest} ({self.model}), "
                f"those of this model {digest}"
            )

    def then(self, later: Plan) -> Plan:
        """One plan for this cut followed by ``later``, which was made for the model this one leaves."""
        moved = {small: self.names.get(between, between) for small, between in later.names.items()}
        moved = {**{small: mine for small, mine in self.names.items() if mine not in moved.values()}, **moved}
        later = self._in_my_names(later)
        cuts = {c.group: c for c in self.cuts}
        for cut in later.cuts:
            first = cuts.get(cut.group)
            if first is not None and len(first.kept) != cut.size:
                raise PlanError(f"{cut.group} has {len(first.kept)} units left, but the later plan expects {cut.size}")
            cuts[cut.group] = cut if first is None else replace(first, kept=first.kept[cut.kept])
        gone = tuple(sorted({*self.gone, *later.gone}, key=natural))
        names = dict.fromkeys((*self.kept, *later.kept))
        kept = {name: _compose(self.kept.get(name, {}), later.kept.get(name, {})) for name in names}
        return replace(
            self,
            cuts=tuple(c for c in cuts.values() if not c.module or renumbered(c.module, gone) is not None),
            kept={name: dims for name, dims in kept.items() if renumbered(name, gone) is not None},
            after=later.after,
            frozen={**self.frozen, **later.frozen},
            options={"first": dict(self.options), "then": dict(later.options)},
            gone=gone,
            names=moved,
            routers={n: d for n, d in {**self.routers, **later.routers}.items() if renumbered(n, gone) is not None},
            gains={g: v for g, v in {**self.gains, **later.gains}.items() if renumbered(g, gone) is not None},
            notes=tuple(dict.fromkeys((*self.notes, *later.notes))),
        )

    def _in_my_names(self, later: Plan) -> Plan:
        """``later`` with the names that groups, tensors and modules have here."""
        if not self.gone and not self.names:
            return later
        for cut in later.cuts:
            if self.gone and cut.kind in ("attention_block", "mlp_block"):
                raise PlanError(
                    f"{cut.group} counts blocks of layers that are gone: cut them in one plan with the layers"
                )
        module = partial(original, gone=self.gone)
        cuts = [replace(c, group=self.names.get(c.group, c.group), module=module(c.module)) for c in later.cuts]
        return replace(
            later,
            cuts=tuple(cuts),
            kept={module(name): dims for name, dims in later.kept.items()},
            frozen={self.names.get(name, name): reason for name, reason in later.frozen.items()},
            gone=tuple(map(module, later.gone)),
            routers={module(name): dim for name, dim in later.routers.items()},
            gains={module(g): module(v) for g, v in later.gains.items()},
        )

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back unchanged."""
        document = {
            "format": "shear-ir plan 1",
            "model": self.model,
            "digest": self.digest,
            "ratio": round(self.ratio, 6),
            "options": dict(self.options),
            "before": vars(self.before),
            "after": vars(self.after),
            "cuts": [
                {"group": c.group, "kind": c.kind, "size": c.size, "kept": intervals(c.kept), "module": c.module,
                 "reason": c.reason}
                for c in self.cuts
            ],
            **({"gone": list(self.gone)} if self.gone else {}),
            **({"names": dict(self.names)} if self.names else {}),
            "kept": {name: {str(d): intervals(i) for d, i in dims.items()} for name, dims in self.kept.items()},
            "frozen": dict(self.frozen),
            **({"routers": dict(self.routers)} if self.routers else {}),
            **({"gains": dict(self.gains)} if self.gains else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }  # fmt: skip
        return _compact(json.dumps(document, indent=2))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; raises ``PlanError`` with the first thing that is wrong in it."""
        try:
            read = document_of(text, _Document)
        except Unreadable as failure:
            raise PlanError(f"this is not a plan: {failure}") from failure
        _require_few(read)
        return cls(
            digest=read.digest,
            model=read.model,
            cuts=tuple(
                Cut(c.group, c.kind, c.size, _indices(c.kept, c.size, c.group), c.module, c.reason) for c in read.cuts
            ),
            kept={n: {int(d): _indices(i, None, n) for d, i in dims.items()} for n, dims in read.kept.items()},
            before=Costs(**read.before.model_dump()),
            after=Costs(**read.after.model_dump()),
            frozen=read.frozen,
            options=read.options,
            gone=tuple(read.gone),
            names=read.names,
            routers=read.routers,
            gains=read.gains,
            notes=tuple(read.notes),
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON beside ``path`` and rename it, so that the file is there whole or not at all."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file; raises ``PlanError``."""
        try:
            text = text_in(Path(path))
        except Unreadable as failure:
            raise PlanError(f"the plan {path} cannot be read: {failure}") from failure
        return cls.from_json(text)


def renumbered(path: str, gone: Collection[str]) -> str | None:
    """Where the module or tensor ``path`` is when the modules ``gone`` have left their lists; None when it left too."""
    parts: list[str] = []
    up = ""
    for part in path.split("."):
        here = f"{up}.{part}" if up else part
        if here in gone:
            return None
        before = [g for g in gone if parent(g) == up and part.isdigit() and int(last(g)) < int(part)]
        parts.append(str(int(part) - len(before)) if before else part)
        up = here
    return ".".join(parts)


def original(path: str, gone: Collection[str]) -> str:
    """Where ``path`` was before the modules ``gone`` left their lists: the inverse of ``renumbered``."""
    up = ""
    for part in path.split("."):
        if part.isdigit():
            for number in sorted(int(last(g)) for g in gone if parent(g) == up):
                part = str(int(part) + (number <= int(part)))
        up = f"{up}.{part}" if up else part
    return up


def natural(path: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts paths with their numbers as numbers."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split("."))


def intervals(indices: Indices) -> list[list[int]]:
    """Sorted indices as half-open intervals ``[[start, stop], ...]``."""
    if not len(indices):
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    starts = indices[np.concatenate([[0], breaks])]
    stops = indices[np.concatenate([breaks - 1, [len(indices) - 1]])] + 1
    return np.stack([starts, stops], axis=1).tolist()  # type: ignore[no-any-return]


def _require_few(read: _Document) -> None:
    """Raise ``PlanError`` where lists of what stays would be longer than those of any model, before they are made."""
    cuts = (cut.kept for cut in read.cuts)
    tensors = (spans for dims in read.kept.values() for spans in dims.values())
    if sum(stop - start for spans in (*cuts, *tensors) for start, stop in spans) > _INDICES:
        raise PlanError(f"this is not a plan: it keeps more than {_INDICES:,} indices")


def _indices(spans: list[tuple[int, int]], size: int | None, name: str) -> Indices:
    last = 0
    for start, stop in spans:
        if start < last or stop <= start or (size is not None and stop > size):
            raise PlanError(f"this is not a plan: {name} keeps the interval [{start}, {stop}], which is out of order")
        last = stop
    parts = [np.arange(start, stop, dtype=np.int64) for start, stop in spans]
    return np.concatenate(parts) if parts else np.arange(0, dtype=np.int64)


def _compose(first: Mapping[int, Indices], then: Mapping[int, Indices]) -> dict[int, Indices]:
    dims = dict(first)
    for dim, kept in then.items():
        dims[dim] = dims[dim][kept] if dim in dims else kept
    return dims


def _compact(text: str) -> str:
    """Indented JSON with each interval on one line, which is how people read and diff it."""
    joined = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
    spans = r"\[\s+(\[\d+, \d+\](?:,\s+\[\d+, \d+\])*)\s+\]"
    return re.sub(spans, lambda found: "[" + " ".join(found[1].split()) + "]", joined)


_Count = Annotated[int, Field(ge=0)]
# No dim of a tensor is as large as that; a file that says otherwise must not make us build such a list.
_Index = Annotated[int, Field(ge=0, le=2**24)]
# Nor do all dims of a model have as many together: Llama-405B has some forty millions.
_INDICES = 2**26
_Spans = list[tuple[_Index, _Index]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _CostsDocument(_Strict):
    parameters: Annotated[int, Field(gt=0)]
    bytes: _Count
    flops: _Count
    kv_bytes: _Count


class _CutDocument(_Strict):
    group: str
    kind: str
    size: _Index
    kept: _Spans
    module: str = ""
    reason: str = ""


class _Document(_Strict):
    format: Literal["shear-ir plan 1"]
    model: str
    digest: str
    ratio: float
    options: dict[str, Any]
    before: _CostsDocument
    after: _CostsDocument
    cuts: list[_CutDocument]
    kept: dict[str, dict[Annotated[str, Field(pattern=r"^\d+$")], _Spans]]
    frozen: dict[str, str] = {}
    gone: list[Annotated[str, Field(pattern=r"^(.+\.)?\d+$")]] = []
    names: dict[str, str] = {}
    routers: dict[str, _Count] = {}
    gains: dict[str, str] = {}
    notes: list[str] = []
