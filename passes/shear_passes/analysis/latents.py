"""Axes that a norm runs over as a product, a table or a sum made them: latents and streams, no channels of an MLP.

A channel of an MLP is activated, alone or by a gate, before anything is made of it. What is normed without (the
compressed queries, keys and values of latent attention, a stream whose sums are scaled) has a width that a config says
for all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from shear_ir.axes import Axis, Freezes, Hold
from shear_passes.analysis.infer_axes import Axes
from shear_passes.ops.registry import Vanish
from shear_passes.ops.traits import Role, traits_of

_ENDS = (Role.SUM, Role.DIFFERENCE, Role.EMBEDDING)


def latents(axes: Axes, found: Iterable[Axis], freezes: Freezes) -> set[Axis]:
    """Those of ``found`` that only a norm holds, over what no activation came before."""
    nodes = {node.name: node for node in axes.program.calls()}
    made = {contraction.node for contraction in axes.contractions if len(contraction.operands) > 1}
    why = [(atom, freezes.of(atom)) for atom in found]
    held = [(atom, nodes.get(freeze.at)) for atom, freeze in why if freeze is not None and freeze.hold is Hold.NORM]
    return {atom for atom, norm in held if norm is not None and _as_made(axes, norm, made)}


def _as_made(axes: Axes, norm: fx.Node, made: set[fx.Node]) -> bool:
    """Whether a norm reads a product, rows of a table or a sum, but for its scale, its square, its type and place."""
    node: object = norm.args[0]
    while isinstance(node, fx.Node) and node not in made and _passes(axes, node):
        node = node.args[0]
    return isinstance(node, fx.Node) and (node in made or traits_of(node).role in _ENDS)


def _passes(axes: Axes, node: fx.Node) -> bool:
    role = traits_of(node).role
    if role is Role.PRODUCT:
        factor = node.args[1]
        given = not isinstance(factor, fx.Node) or axes.program.param(factor) is not None
        return given or factor is node.args[0]
    return role is Role.SQUARE or axes.vanish.get(node.name) is Vanish.MOVED
