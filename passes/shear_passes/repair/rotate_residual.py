"""One orthogonal basis of the residual stream in which the last directions matter least (SliceGPT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, fx

from shear_ir.errors import PlanError, ShearingError
from shear_passes.analysis.consumers import Consumer, Consumers
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.importance.statistics import CalibrationStatistics
from shear_passes.ops.registry import Vanish
from shear_passes.rewrite.rescale_norm import NormFix, norm_fixes, scale_of


def residual_of(groups: Groups) -> Group:
    """The widest group that only RMS norms hold; raises ``PlanError`` where there is none."""
    found = [g for g in groups if g.kind == "residual" and (g.prunable or g.rescalable)]
    if not found:
        held = next((g.reason for g in groups if g.kind == "residual"), "there is none")
        raise PlanError(f"the residual stream of this model cannot be rotated: {held}")
    return max(found, key=lambda g: g.parameters_per_unit * g.size)


def tied_readers(groups: Groups, consumers: Consumers) -> tuple[str, ...]:
    """The parameters that read a norm of the stream and are tied to others, which do not: those have to be untied."""
    group = residual_of(groups)
    norms = _norms(groups, group)
    aliases = {name: param.aliases for name, param in groups.program.params.items()}
    return tuple(
        c.parameter for c in consumers.of(group)
        if aliases[c.parameter] and _read_scale(groups, c, norms) is not None
    )  # fmt: skip


def with_plain_norms(weights: Mapping[str, Tensor], groups: Groups, consumers: Consumers) -> dict[str, Tensor]:
    """The norms of the residual stream without a scale of their own: their consumers carry it.

    A consumer reads ``w * x / rms(x)``: its columns times w, with w one, are the same function. None of them may be
    tied (``tied_readers``). Raises ``PlanError``
    for a norm whose result is read by anything but products of parameters.
    """
    group, changed = residual_of(groups), dict[str, Tensor]()
    norms = _norms(groups, group)
    for consumer in consumers.of(group):
        scale = _read_scale(groups, consumer, norms)
        if scale is not None:
            factor = (weights[scale.parameter].detach() + scale.offset).double()
            old = weights[consumer.parameter].detach()
            changed[consumer.parameter] = (old.double() * consumer.spread(factor, old)).to(old.dtype)
    for norm in norms.values():
        changed[norm.parameter] = torch.full_like(weights[norm.parameter].detach(), 1.0 - norm.offset)
    return changed


def rotated_stream(weights: Mapping[str, Tensor], groups: Groups, basis: Tensor) -> dict[str, Tensor]:
    """Every parameter of the stream along ``basis``, an orthogonal matrix of shape ``(hidden, hidden)``: ``x' = x Q``.

    Its norms have to be plain. Raises ``PlanError`` for a dim that the stream is only a part of.
    """
    group = residual_of(groups)
    norms = _norms(groups, group)
    changed: dict[str, Tensor] = {}
    for piece in group.slices:
        if piece.expression is not group.axis:
            raise PlanError(f"dim {piece.dim} of {piece.parameter} is more than the residual stream: it stays as it is")
        if piece.parameter not in norms:
            old = changed.get(piece.parameter, weights[piece.parameter].detach())
            turned = old.movedim(piece.dim, -1).double() @ basis.to(old.device, torch.float64)
            changed[piece.parameter] = turned.movedim(-1, piece.dim).to(old.dtype).contiguous()
    return changed


def principal_basis(groups: Groups, consumers: Consumers, statistics: CalibrationStatistics) -> Tensor:
    """The eigenvectors of what the stream's consumers read, in fp64, those of the largest variance first.

    Each of them reads a normalised stream, so all of them count alike (Ashkboos et al. 2024, with one Q for all).
    """
    group = residual_of(groups)
    seen = {id(m): m for c in consumers.of(group) if c in statistics for m in [statistics[c]]}
    grams = [m.gram / m.count for m in seen.values() if m.gram is not None]
    total = torch.stack([g.double().cpu() for g in grams]).sum(0)
    vectors: Tensor = torch.linalg.eigh(total).eigenvectors
    return vectors.flip(-1)


def _norms(groups: Groups, group: Group) -> dict[str, NormFix]:
    """The norms over the stream by the parameter that scales them."""
    stays = np.ones(group.size, dtype=bool)
    stays[-1] = False
    try:
        return {fix.parameter: fix for fix in norm_fixes(groups, {group.axis: stays})}
    except ShearingError as failure:
        raise PlanError(f"the residual stream cannot be rotated: {failure}") from failure


def _read_scale(groups: Groups, consumer: Consumer, norms: Mapping[str, NormFix]) -> NormFix | None:
    """The norm whose result the consumer reads; None for a consumer of the bare stream."""
    nodes = {n.name: n for n in groups.program.nodes}
    found = {s for name in consumer.sources for s in _scales(groups, nodes[name], norms)}
    if len(found) > 1:
        raise PlanError(f"{consumer.parameter} reads several norms, which may scale unlike each other")
    return norms[found.pop()] if found else None


def _scales(groups: Groups, node: fx.Node, norms: Mapping[str, NormFix]) -> Iterable[str]:
    while groups.axes.vanish.get(node.name) is Vanish.MOVED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    for operand in node.all_input_nodes:
        scale = scale_of(groups.program, operand)
        if scale is not None and scale[0] in norms:
            yield scale[0]
