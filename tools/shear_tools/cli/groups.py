"""``shear-ir groups``: what can be removed together, and why the rest cannot."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shear_ir.errors import ShearError
from shear_tools.cli import console, options
from shear_tools.cli.models import open_model

if TYPE_CHECKING:
    from shear_passes.analysis.find_groups import Group, Groups, Slice


def groups(
    model: options.ModelArgument,
    kind: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="Only groups of this kind; repeatable.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Frozen groups too, with the reason.")] = False,
    slices: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The slices of this one group: which indices each unit owns.", show_default=False
        ),
    ] = None,
    inputs: options.InputsOption = None,
    trust_remote_code: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """List the groups of MODEL: structures whose units can be removed together, all slices at once."""
    from shear_ir.printer import value_names
    from shear_tools.api import pipeline

    with console.Steps("loading", "tracing", "analysing") as step:
        with step("loading"):
            loaded = open_model(model, trust_remote_code, inputs=inputs, weights=False)
        with step("tracing"):
            program = pipeline.trace(loaded.model)
        with step("analysing"):
            found = pipeline.groups(program)
    if slices is not None:
        _put_slices(found, _named(found, slices), json)
        return
    chosen = _chosen(found, kind or [])
    shown = [g for g in chosen if everything or g.prunable]
    if json:
        console.put_json({"model": model, "class": program.owner, "groups": [_document(g, found) for g in shown]})
        return
    headings = ("name", "kind", "units", "tensors", "per unit", "parameters", "module", "state")
    names = value_names(program)
    rows = [_row(g, found, names) for g in shown]
    console.put_table(console.table(f"groups of {program.owner}", headings, rows, headings[2:6]))
    frozen = sum(not g.prunable for g in chosen)
    hidden = f" (--all shows {'it' if frozen == 1 else 'them'})" if frozen and not everything else ""
    console.put_lines(
        f"{len(chosen) - frozen} prunable, {frozen} frozen{hidden}",
        "shear-ir explain MODEL NAME says which operators tie a group together, or froze it",
    )


def _chosen(found: Groups, kinds: Sequence[str]) -> list[Group]:
    known = sorted({g.kind for g in found})
    for kind in kinds:
        if kind not in known:
            raise ShearError(f"the model has no {kind} groups; it has {', '.join(known)}")
    return [g for g in found if not kinds or g.kind in kinds]


def _named(found: Groups, name: str) -> Group:
    if name not in found.by_name:
        near = difflib.get_close_matches(name, found.by_name, n=4, cutoff=0.4) or list(found.by_name)[:4]
        raise ShearError(f"the model has no group {name}; it has {', '.join(near)}")
    return found.by_name[name]


def _row(group: Group, found: Groups, names: Mapping[str, str]) -> tuple[str, ...]:
    from shear_passes.analysis.dump import element_count, short_reason

    state = "prunable" if group.prunable else f"frozen: {short_reason(group.reason, names)}"
    total = element_count(group, found.axes)
    counts = (group.size, len(group.parameters), group.parameters_per_unit, total)
    return (group.name, group.kind, *(f"{count:,}" for count in counts), group.module, state)


def _document(group: Group, found: Groups) -> dict[str, Any]:
    from shear_passes.analysis.dump import element_count

    return {
        "name": group.name,
        "kind": group.kind,
        "size": group.size,
        "tensors": list(group.parameters),
        "parameters_per_unit": group.parameters_per_unit,
        "parameters": element_count(group, found.axes),
        "module": group.module,
        "prunable": group.prunable,
        "reason": group.reason,
    }


def _put_slices(found: Groups, group: Group, json: bool) -> None:
    if json:
        pieces = [
            {"parameter": s.parameter, "dim": s.dim, "axes": found.show(s.expression), "units": _owned(s)}
            for s in group.slices
        ]
        console.put_json({**_document(group, found), "slices": pieces})
        return
    headings = ("parameter", "dim", "axes", "what each unit owns")
    rows = [(s.parameter, str(s.dim), found.show(s.expression), _told(_owned(s))) for s in group.slices]
    console.put_table(console.table(f"{group.name}: {group.size:,} {group.kind} units", headings, rows, ("dim",)))


def _owned(piece: Slice) -> list[list[list[int]]]:
    """The half-open intervals of indices that each unit owns."""
    import numpy as np

    from shear_ir.plans import intervals

    owned: list[list[list[int]]] = [[] for _ in range(piece.axis.size)]
    for owner in piece.index_map:
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(piece.axis.size + 1))
        for unit, spans in enumerate(owned):
            spans += intervals(order[bounds[unit] : bounds[unit + 1]])
    return owned


def _told(owned: Sequence[Iterable[Sequence[int]]]) -> str:
    """The first two units and the last, which show the pattern."""
    places = dict.fromkeys((0, 1, len(owned) - 1)) if len(owned) > 1 else (0,)
    units = [f"{place}: {' '.join(f'[{a}, {b})' for a, b in owned[place])}" for place in places]
    return "  ".join([*units[:2], "…", *units[2:]] if len(owned) > 3 else units)
