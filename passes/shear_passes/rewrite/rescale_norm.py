"""Exact RMS norms on fewer channels: ``weight * sqrt(d/d')`` and ``eps * d/d'`` (DESIGN section 1.3).

The masked norm is ``x / sqrt(S/d + eps) * w`` with ``S`` the sum of squares of the kept channels; the norm over the
d' kept ones is ``x / sqrt(S/d' + eps') * w'``, and the two are equal for the values above. One that divides by the mean
itself, as global response normalisation does, has ``weight * d/d'``. The graph backend rescales the mean itself; this
says what a backend that keeps the modules has to change in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from shear_ir.axes import Axis, Mask, atoms, evaluate
from shear_ir.errors import ShearingError
from shear_ir.nodes import module_path
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Groups
from shear_passes.ops.norm import computed_in
from shear_passes.ops.registry import Contraction, op_name

aten = torch.ops.aten

_AS_IS = ("aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy", "aten.alias", "aten.detach")


@dataclass(frozen=True)
class NormFix:
    """One norm: its module, its old ``eps``, the parameter that scales it as ``(parameter + offset)``.

    ``factor`` is d/d', ``power`` that of the mean which the norm divides by: the new parameter is
    ``(p + offset) * factor**power - offset``, the new eps ``eps * factor``.
    """

    module: str
    eps: float | None
    parameter: str
    offset: float
    factor: float
    power: float = 0.5


def norm_fixes(groups: Groups, masks: Mapping[Axis, Mask]) -> list[NormFix]:
    """What every mean over a cut axis needs; raises ``ShearingError`` for one that is not a scaled RMS norm."""
    program = groups.program
    fixes = []
    for made in groups.axes.contractions:
        if made.mean and any(a in masks for dim in made.over for a in atoms(dim)):
            fixes.append(_fix(program, groups, made, _factor(made, masks)))
    return fixes


def _factor(made: Contraction, masks: Mapping[Axis, Mask]) -> float:
    old = math.prod(d.size for d in made.over)
    new = math.prod(evaluate(d, lambda a: int(masks[a].sum()) if a in masks else a.size) for d in made.over)
    return old / new


def _fix(program: Program, groups: Groups, made: Contraction, factor: float) -> NormFix:
    eps, power = _own_eps(program, made.node), _power(made.node)
    if power is None:
        raise ShearingError(
            f"what is made of the mean at {module_path(made.node) or 'the root'} is no division by it or by its root, "
            "so a weight cannot carry the factor of a narrower axis: use the graph backend"
        )
    for node in _readers(made.node):
        if op_name(node) == "aten.add.Tensor" and eps is None and isinstance(node.args[1], float):
            eps = node.args[1]
        for operand in node.all_input_nodes:
            found = scale_of(program, operand)
            if op_name(node) in ("aten.mul.Tensor", "aten.rms_norm") and found is not None:
                return NormFix(module_path(made.node), eps, found[0], found[1], factor, power)
    raise ShearingError(
        f"the norm at {module_path(made.node) or 'the root'} has no weight that could carry the factor of a narrower "
        "axis: use the graph backend"
    )


def _power(mean: fx.Node) -> float | None:
    """The power of a mean, with its eps, that all is divided by; None where it is used in another way."""
    if op_name(mean) == "aten.rms_norm":
        return 0.5
    node, power = mean, 1.0
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name == "aten.rsqrt":
            return power / 2
        if name == "aten.reciprocal" or (name == "aten.div.Tensor" and user.args[1] is node):
            return power
        if name == "aten.pow.Tensor_Scalar" and user.args[1] == -0.5:
            return power / 2
        if name == "aten.sqrt" or (name == "aten.pow.Tensor_Scalar" and user.args[1] == 0.5):
            power /= 2
        elif not (name in _AS_IS or (name == "aten.add.Tensor" and power == 1 and isinstance(user.args[1], float))):
            return None
        node = user
    return None


def _own_eps(program: Program, node: fx.Node) -> float | None:
    """What a norm that is one call adds to the mean; None for any other call."""
    if op_name(node) != "aten.rms_norm":
        return None
    eps = node.args[3] if len(node.args) > 3 else None
    return eps if isinstance(eps, float) else torch.finfo(computed_in(program.types[node.name][0].dtype)).eps


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and the chain of calls after it, breadth first, for as far as a norm reaches."""
    queue, seen = [node], {node}
    while queue and len(seen) < 32:
        current = queue.pop(0)
        yield current
        for user in current.users:
            if user not in seen and op_name(user).partition(".")[0] != "output":
                seen.add(user)
                queue.append(user)


def scale_of(program: Program, node: fx.Node) -> tuple[str, float] | None:
    """The parameter behind a factor ``p`` or ``p + c``, with c."""
    offset = 0.0
    while program.param(node) is None:
        if op_name(node) == "aten.add.Tensor" and isinstance(node.args[1], int | float):
            offset += float(node.args[1])
        elif op_name(node) not in _AS_IS:
            return None
        first = node.args[0]
        if not isinstance(first, fx.Node):
            return None
        node = first
    param = program.param(node)
    return (param.name, offset) if param is not None and param.kind == "parameter" else None
