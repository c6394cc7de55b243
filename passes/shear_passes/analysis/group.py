"""What leaves together: a group, and the slices of parameters that its units own."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from shear_ir.axes import Axis, Dim, Freeze, Hold, Indices, owners
from shear_passes.analysis.roles import Kind


@dataclass(frozen=True)
class Slice:
    """One place a group's axis occurs in: a dim of a parameter, whose expression says which index is whose.

    ``spared``: a mask of zeros leaves it as it is, for it is divided by its norm, and another slice removes it.
    """

    parameter: str
    dim: int
    expression: Dim
    axis: Axis
    _: KW_ONLY
    spared: bool = False

    @cached_property
    def index_map(self) -> list[Indices]:
        """Unit that owns each index of the dim, -1 for none; shape ``(size of the dim,)``, nearly always one array."""
        return owners(self.expression, self.axis)


@dataclass(frozen=True, eq=False)
class Group:
    """A prunable axis, or one that would be but for ``reason``. Unit i is index i and the slices it owns.

    ``least``: how many units have to stay, as of experts of which so many are chosen for every token. ``multiple``:
    the number of units that stay is a multiple of it, where a kernel wants that of its operands. ``freeze``: what holds
    it, found by any of the analyses.
    """

    name: str
    kind: Kind
    size: int
    axis: Axis
    slices: tuple[Slice, ...]
    parameters_per_unit: int
    module: str
    _: KW_ONLY
    least: int = 1
    multiple: int = 1
    freeze: Freeze | None = None

    @property
    def prunable(self) -> bool:
        """Whether units can be removed as they are."""
        return self.freeze is None

    @property
    def rescalable(self) -> bool:
        """Whether only a norm holds the axis that an exact rescaling can lift."""
        return self.freeze is not None and self.freeze.hold is Hold.NORM

    @property
    def reason(self) -> str:
        """Why units cannot be removed; empty when they can."""
        return "" if self.freeze is None else self.freeze.reason

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors the axis occurs in, in graph order."""
        return tuple(dict.fromkeys(s.parameter for s in self.slices))

    def __str__(self) -> str:
        state = "prunable" if self.prunable else f"frozen: {self.reason}"
        return (
            f"{self.name:10} {self.kind:12} {self.size:6} units  {len(self.parameters):3} tensors  "
            f"{self.parameters_per_unit:>12,} parameters per unit  {state}"
        )
