"""What an explanation is made of: dims as people read them, and chains of calls between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from shear_ir.nodes import SourceLine
from shear_passes.analysis.explain_text import text
from shear_passes.analysis.roles import Kind


@dataclass(frozen=True)
class At:
    """A dim of a value as people read it: ``value`` under its printed name, ``axes`` with the names of groups.

    ``dim`` is None for a value as a whole, -1 for its entries where those number the indices of the axis.
    ``part``: which of the axis's occurrences in the dim is meant, as ``2nd r``; empty where there is one.
    """

    value: str
    dim: int | None
    axes: str
    part: str = ""

    def __str__(self) -> str:
        dim = "" if self.dim is None else ", its entries" if self.dim < 0 else f", dim {self.dim}"
        return self.value + dim + (f", {self.part}" if self.part else "")


@dataclass(frozen=True)
class Step:
    """One call: it ties the dim before it to ``to``; None where it freezes the dim before it instead.

    ``spoils``: entries at removed indices, zero before it, are not zero after it, which is why a later sum freezes.
    """

    node: str
    operator: str
    value: str
    module: str
    line: SourceLine | None
    to: At | None
    spoils: bool = False


@dataclass(frozen=True)
class Chain:
    """From ``start`` over ``steps``; ``alike``: the chains of other layers that read the same but for numbers.

    ``reason``: of a chain of blocks, why it cannot go.
    """

    start: At
    steps: tuple[Step, ...]
    alike: tuple[Chain, ...] = field(default=(), compare=False)
    reason: str = ""

    @property
    def end(self) -> At:
        """What the chain reaches; the last dim before the call that froze it."""
        return next((step.to for step in reversed(self.steps) if step.to is not None), self.start)


@dataclass(frozen=True)
class Proof:
    """One axis: what froze it, and what ties each of its slices to ``root`` or to what an earlier chain passed.

    ``apart``: slices that no chain of calls, each taken by itself, leads to. ``seen``: for an axis that no call
    froze, the operators that it meets. ``blocks``: the units are blocks, and each chain leads over the sums of one.
    """

    group: str
    kind: Kind
    size: int
    slices: int
    module: str
    reason: str
    rescalable: bool
    root: At
    freeze: Chain | None
    chains: tuple[Chain, ...]
    apart: tuple[At, ...] = ()
    seen: tuple[str, ...] = ()
    blocks: bool = False


@dataclass(frozen=True)
class Explanation:
    """The proofs that answer for ``name``: one for a group, one for each axis of a parameter or of one of its dims."""

    name: str
    owner: str
    proofs: tuple[Proof, ...]

    def __str__(self) -> str:
        return text(self)
