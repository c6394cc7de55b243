"""The text form of a Program with the names of its axes, and a table of its groups below."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from shear_ir.axes import Dim, atoms, evaluate
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.printer import render
from shear_ir.program import Param, Program
from shear_passes.analysis.find_groups import BlockGroup, FindGroups, Group, Groups
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.roles import Kind

KIND_WORDS: dict[Kind, str] = {
    "ffn": "mlp channels", "kv_head": "kv heads", "query_group": "query groups", "head_dim": "head channels",
    "rotary_pair": "rotary pairs", "residual": "residual", "lora_rank": "lora ranks", "expert": "experts",
    "conv_channel": "conv channels", "vocab": "vocabulary", "block": "blocks",
    "attention_block": "attention blocks", "mlp_block": "mlp blocks", "other": "other",
}  # fmt: skip


@dataclass(frozen=True)
class Dump(Analysis[str]):
    """The program as text: dims by the groups they belong to, barriers with their reasons, groups in a table."""

    requires = (InferAxes, FindGroups)

    def run(self, program: Program, analyses: AnalysisManager) -> str:
        """Linear in the number of nodes."""
        # Groups are found first: finding them freezes axes, and naming an axis takes all of them.
        groups = analyses.get(FindGroups())
        return render(program, _Labels(analyses.get(InferAxes()), groups))


@dataclass(frozen=True)
class _Labels:
    axes: Axes
    groups: Groups

    def param_dims(self, param: Param) -> Sequence[str]:
        return [self._show(dim) for dim in self.axes.of_param[param.name]]

    def value_dims(self, node: fx.Node, place: int) -> Sequence[str]:
        return [self._show(dim) for dim in self.axes.of_node[node.name][place]]

    def remark(self, node: fx.Node) -> str:
        reason = self.axes.barriers.get(node.name)
        return f"barrier: {reason}" if reason else ""

    def footer(self, names: Mapping[str, str]) -> Sequence[str]:
        return _aligned([_row(group, self.axes, names) for group in self.groups.of_axes])

    def _show(self, dim: Dim) -> str:
        """A dim with the names of its axes; its size alone when none of them is in a parameter."""
        return self.groups.show(dim) if any(map(self.groups.label, atoms(dim))) else str(dim.size)


def element_count(group: Group, axes: Axes) -> int:
    """How many elements of parameters the units of a group own together."""
    if isinstance(group, BlockGroup):
        return group.parameters_per_unit * group.size
    counted = 0
    for name in group.parameters:
        param = axes.program.params[name]
        if param.kind == "parameter":
            without = 1
            for dim in axes.of_param[name]:
                without *= _size_without(dim, group)
            counted += param.numel - without
    return counted


def short_reason(reason: str, names: Mapping[str, str], most: int = 160) -> str:
    """A reason with values under their printed names, without the operator, and cut to ``most`` characters."""
    named = re.sub(r"%(\w+)(?: = [\w.]+)?", lambda found: names.get(found[1], found[0]), reason)
    return named if len(named) <= most else named[: most - 1].rstrip() + "…"


def _size_without(dim: Dim, group: Group) -> int:
    return evaluate(dim, lambda atom: 0 if atom is group.axis else atom.size)


def _row(group: Group, axes: Axes, names: Mapping[str, str]) -> tuple[str, ...]:
    state = "prunable" if group.prunable else f"frozen: {short_reason(group.reason, names)}"
    tensors = len(group.parameters)
    return (
        group.name,
        KIND_WORDS[group.kind],
        f"{_spaced(group.size)} units",
        f"{tensors} tensor" + "s" * (tensors != 1),
        f"{_spaced(element_count(group, axes))} parameters",
        state,
    )


def _spaced(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Words to the left, counts to the right, the last column as it is."""
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell if i == len(row) - 1 else cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])
            for i, cell in enumerate(row)
        )
        for row in rows
    ]
