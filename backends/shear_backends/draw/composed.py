"""Boxes of composed operators: base, A and B of a LoRA layer are one box, with the ranks and scales in its title."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from shear_ir.nodes import module_path
from shear_ir.paths import inside, parent
from shear_ir.program import Program
from shear_passes.analysis.lora import Composed, find_lora
from shear_passes.ops.registry import op_name


@dataclass(frozen=True)
class Part:
    """A tensor of a composed operator: the path of the box, what is said of it, and what the tensor is in it."""

    path: str
    title: str
    name: str


def composed_parts(program: Program) -> Mapping[str, Part]:
    """The parts of the composed operators that are single calls, by the names of parameters."""
    found = [made for made in find_lora(program) if made.raised]
    places = Counter(module_path(made.root) for made in found)
    parts: dict[str, Part] = {}
    for made in found:
        names = dict(_named(program, made))
        path = module_path(made.root)
        # Where one module holds several, or is the whole model, the base lends its place.
        if places[path] > 1 or not path or not all(inside(name, path) for name in names):
            path = parent(next(iter(names)))
        title = _title(program, made)
        parts |= {name: Part(path, title, role) for name, role in names.items()}
    return parts


def _named(program: Program, made: Composed) -> Iterator[tuple[str, str]]:
    yield from _name(program, made.base.weight, "weight")
    yield from _name(program, made.base.bias, "bias")
    adapters = _apart([p.name for b in made.branches if (p := program.param(b.a)) is not None])
    for branch, adapter in zip(made.branches, adapters, strict=True):
        for node, role in ((branch.a, "A"), (branch.b, "B"), (branch.bias, "B bias"), (branch.magnitude, "magnitude")):
            yield from _name(program, node, f"{role} {adapter}".strip())


def _name(program: Program, node: fx.Node | None, role: str) -> Iterator[tuple[str, str]]:
    param = None if node is None else program.param(node)
    if param is not None:
        yield param.name, role


def _apart(names: list[str]) -> list[str]:
    """What tells names apart: their first part that differs; empty for a single one."""
    columns = [set(column) for column in zip(*(name.split(".") for name in names), strict=False)]
    place = next((i for i, column in enumerate(columns) if len(column) > 1), None)
    return ["" if place is None else name.split(".")[place] for name in names]


def _title(program: Program, made: Composed) -> str:
    ranks = [str(kind.shape[0]) if (kind := program.type(b.a)) else "?" for b in made.branches]
    scales = [f"{branch.scale:.3g}" for branch in made.branches]
    dropped = [f"{branch.dropout:g}" for branch in made.branches if branch.dropout]
    said = [op_name(made.root), f"rank {' + '.join(ranks)}", f"scale {', '.join(scales)}"]
    return " · ".join([*said, *([f"dropout {', '.join(dropped)}"] if dropped else [])])
