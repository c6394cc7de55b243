"""Which operators a model is made of, which of them have a typing rule, and what the others freeze.

    python tools/op_census.py MODEL [--json]

MODEL is what ``shear-ir`` takes (a folder, a folder with only ``config.json``, ``package.module:factory``), or the name
of an architecture that transformers knows, such as ``llama``: its default config, on the meta device.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from shear_ir.axes import Axis, atoms
from shear_ir.errors import LoadError, ShearError
from shear_ir.frontend.export import trace
from shear_ir.frontend.load import load_model
from shear_ir.manager import AnalysisManager
from shear_ir.nodes import module_path
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.ops.pointwise import pointwise_entry
from shear_passes.ops.registry import entry_of, op_name


@dataclass(frozen=True)
class Operator:
    """One operator: how often it is called, and where its typing rule comes from: table, pointwise or none."""

    name: str
    calls: int
    rule: str


@dataclass(frozen=True)
class Held:
    """A group that a barrier freezes, and the tensors it runs through."""

    group: str
    kind: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Barrier:
    """Calls of one operator that cannot be followed, for one reason: where they stand and what they freeze."""

    operator: str
    reason: str
    modules: tuple[str, ...]
    held: tuple[Held, ...]


@dataclass(frozen=True)
class Census:
    """The operators of a model, the most frequent first, and its barriers in the order of the graph."""

    model: str
    operators: tuple[Operator, ...]
    barriers: tuple[Barrier, ...]


def census(model: nn.Module) -> Census:
    """Trace ``model`` and count."""
    program = trace(model)
    groups = AnalysisManager(program).get(FindGroups())
    return Census(program.owner, tuple(_operators(program)), tuple(_barriers(groups)))


def named(spec: str, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that ``spec`` names; an architecture's name is its default config, without weights."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if spec not in CONFIG_MAPPING:
        return load_model(spec, trust_remote_code=trust_remote_code).model
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(spec).save_pretrained(folder)
        try:
            return load_model(folder).model
        except LoadError as failure:
            raise LoadError(str(failure).replace(folder, f"the default config of {spec}")) from failure


def _operators(program: Program) -> Iterator[Operator]:
    calls = Counter(op_name(node) for node in program.calls())
    targets = {op_name(node): node.target for node in program.calls()}
    for name, count in sorted(calls.items(), key=lambda item: (-item[1], item[0])):
        yield Operator(name, count, _rule(targets[name]))


def _rule(target: object) -> str:
    if entry_of(target) is not None:
        return "table"
    return "none" if pointwise_entry(target) is None else "pointwise"


def _barriers(groups: Groups) -> Iterator[Barrier]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for node in groups.program.calls():
        if node.name in groups.axes.barriers:
            by_reason.setdefault((op_name(node), groups.axes.barriers[node.name]), []).append(node.name)
    nodes = {node.name: node for node in groups.program.nodes}
    for (operator, reason), names in by_reason.items():
        held = dict.fromkeys(
            groups.by_axis[a] for name in names for a in _frozen(groups, nodes[name]) if a in groups.by_axis
        )
        yield Barrier(
            operator,
            reason,
            tuple(dict.fromkeys(module_path(nodes[name]) for name in names)),
            tuple(Held(g.name, g.kind, g.parameters) for g in held),
        )


def _frozen(groups: Groups, node: fx.Node) -> Iterator[Axis]:
    """The axes of what a barrier reads and of what it makes."""
    for value in (*node.all_input_nodes, node):
        for dims in groups.axes.of_node.get(value.name, []):
            yield from (atom for dim in dims for atom in atoms(dim))


def report(found: Census, console: Console) -> None:
    """Print the census as two tables; the second one only where there are barriers."""
    table = Table("operator", title=f"operators of {found.model}")
    table.add_column("calls", justify="right")
    table.add_column("rule")
    for op in found.operators:
        table.add_row(op.name, str(op.calls), op.rule, style="bold red" if op.rule == "none" else None)
    console.print(table)
    if not found.barriers:
        console.print("no barriers")
        return
    table = Table("barrier", "in modules", "freezes", title="barriers")
    for barrier in found.barriers:
        held = "\n".join(f"{h.group} ({h.kind}): {_some(h.parameters)}" for h in barrier.held)
        table.add_row(barrier.reason, _some(barrier.modules), held or "nothing a parameter has")
    console.print(table)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(name or "the root" for name in names[:2])
    return shown + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, package.module:factory or architecture.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """List the operators of MODEL, which of them lack a typing rule, and what those freeze."""
    try:
        found = census(named(model, trust_remote_code=trust_remote_code))
    except ShearError as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(2) from failure
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        report(found, Console())


if __name__ == "__main__":
    typer.run(main)
