"""Normalised weights ``g * v / |v|``: which parameters they are made of, and what a cut of v does to g."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from shear_ir.program import Program
from shear_passes.ops.norm import WEIGHT_NORMS


def weight_norms(program: Program) -> Iterator[tuple[str, str]]:
    """The names of g and v of every normalised weight."""
    for node in program.calls():
        if node.target in WEIGHT_NORMS:
            v, g = (program.param(argument) for argument in node.args[:2] if isinstance(argument, fx.Node))
            if v is not None and g is not None:
                yield g.name, v.name


def cut_gains(program: Program, kept: Mapping[str, object]) -> dict[str, str]:
    """Each g whose v loses indices, with that v."""
    return {g: v for g, v in weight_norms(program) if v in kept}
