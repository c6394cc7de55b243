"""What ``shear-ir prune`` reports: sizes before and after, what was cut, whether it is sound, what loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from shear_tools.cli import console

if TYPE_CHECKING:
    from torch import nn

    from shear_backends.store.model import Saved
    from shear_backends.verify.numbers import Report
    from shear_ir.plans import Cut, Plan
    from shear_passes.analysis.find_groups import Groups


@dataclass
class PruneReport:
    """One run of prune. ``costs``: what changing the weights before it costs, in sentences. ``verified`` and ``saved``
    are None where that step was left out.
    """

    spec: str
    model: nn.Module
    groups: Groups
    plan: Plan
    seconds: dict[str, float]
    costs: list[str] = field(default_factory=list)
    verified: Report | None = None
    saved: Saved | None = None

    @property
    def tokens(self) -> bool:
        """Whether the model reads tokens."""
        program = self.groups.program
        return any(not t.dtype.is_floating_point for t in program.input_types.values())

    @property
    def warnings(self) -> list[str]:
        """Sentences the user should read before using the result."""
        from shear_passes.importance import CRITERIA, HARMLESS, blind_costs

        if not self.tokens or self.plan.ratio <= HARMLESS or self.plan.options.keys() & {"repair", "rotate"}:
            return self.costs
        # By our own names alone: the options may be those of a plan that a stranger wrote.
        made = {name: CRITERIA.get(name.partition("{")[0]) for name in _criteria(self.plan.options)}
        return self.costs + [blind_costs(name) for name, make in made.items() if make is not None and make().blind]

    @property
    def stock(self) -> tuple[bool, str]:
        """Whether the stock class loads the result, and why not; foreseen where nothing was saved."""
        if self.saved is not None:
            return self.saved.stock, self.saved.note
        return _foreseen(self)


def _criteria(options: Mapping[str, Any]) -> list[str]:
    """The criteria by which a plan was made, or the plans that were joined to it."""
    mine = [str(options["importance"])] if "importance" in options else []
    return [*mine, *(name for inner in options.values() if isinstance(inner, Mapping) for name in _criteria(inner))]


def put(result: PruneReport) -> None:
    """Print the tables and lines for people."""
    plan, unit = result.plan, "token" if result.tokens else "sample"
    before, after = plan.before, plan.after
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("bytes", before.bytes, after.bytes),
        (f"FLOPs per {unit}", before.flops, after.flops),
    ]
    rows += [("KV-cache bytes per token", before.kv_bytes, after.kv_bytes)] if before.kv_bytes else []
    lines = [(name, f"{old:,}", f"{new:,}", _percent(old, new)) for name, old, new in rows]
    title = f"{plan.model}, {'sheared' if result.saved else 'planned'}"
    console.put_table(console.table(title, ("", "before", "after", "change"), lines, ("before", "after", "change")))
    console.put_lines(*(f"cut    {line}" for line in _cut_lines(plan)))
    console.put_lines(*(f"note   {sentence}" for sentence in plan.notes))
    if result.verified is not None:
        console.put_lines(f"check  {result.verified}")
    stock, why = result.stock
    kind = type(_base(result.model)).__name__
    reads = "shear_ir.load(OUT)" if _pretrained(result.model) else "shear_ir.load(OUT, model=...)"
    loads = f"yes: {kind}.from_pretrained loads it" if stock else f"no ({why}): {reads} does"
    console.put_lines(f"stock  {loads}")
    console.put_lines(f"time   {', '.join(f'{name} {s:.1f} s' for name, s in result.seconds.items())}")
    if result.saved is not None:
        console.put_lines(f"wrote  {result.saved.path}")


def as_json(result: PruneReport) -> dict[str, Any]:
    """The same for machines."""
    stock, why = result.stock
    found = result.verified
    return {
        "model": result.spec,
        "class": result.plan.model,
        "out": str(result.saved.path) if result.saved else None,
        "ratio": result.plan.ratio,
        "before": asdict(result.plan.before),
        "after": asdict(result.plan.after),
        "cuts": [{"kind": kind, **_summary(cuts)} for kind, cuts in _by_kind(result.plan).items()],
        "options": dict(result.plan.options),
        "notes": list(result.plan.notes),
        "verified": {**asdict(found), "sound": found.sound, "judge": found.judge} if found else None,
        "stock": stock,
        "why_not_stock": why,
        "seconds": result.seconds,
        "warnings": result.warnings,
    }


def _pretrained(model: nn.Module) -> bool:
    """Whether the class of ``model`` is one of transformers, which its saved config names."""
    return hasattr(_base(model), "save_pretrained")


def _base(model: nn.Module) -> Any:
    """The model that a PEFT model adapts, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _foreseen(result: PruneReport) -> tuple[bool, str]:
    from shear_backends.module.config_inference import infer_config
    from shear_backends.module.depth import foreseen
    from shear_ir.errors import ShearingError
    from shear_passes.rewrite.cuts import checked

    if not _pretrained(result.model):
        return False, "not a transformers model"
    if result.plan.gone:
        return foreseen(result.model, result.groups, result.plan)
    cut = checked(result.groups, result.plan)
    try:
        norms = cut.norms
    except ShearingError as failure:
        return False, str(failure)
    found = infer_config(result.model, result.groups, cut.masks, result.plan.kept, norms)
    return found.config is not None, "" if found.config else found.refused or "no config of the class has these sizes"


def _by_kind(plan: Plan) -> dict[str, list[Cut]]:
    found: dict[str, list[Cut]] = {}
    for cut in plan.cuts:
        found.setdefault(cut.kind, []).append(cut)
    return found


def _summary(cuts: list[Cut]) -> dict[str, int]:
    return {"groups": len(cuts), "units": sum(c.size for c in cuts), "kept": sum(len(c.kept) for c in cuts)}


def _cut_lines(plan: Plan) -> list[str]:
    lines = []
    for kind, cuts in _by_kind(plan).items():
        sizes, kept = _range([c.size for c in cuts]), _range([len(c.kept) for c in cuts])
        groups = f"{len(cuts)} group" + "s" * (len(cuts) != 1)
        lines.append(f"{kind}: {sizes} to {kept} units in {groups}")
    return lines


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _percent(old: int, new: int) -> str:
    return f"{100 * (new - old) / old:+.1f} %" if old else ""
