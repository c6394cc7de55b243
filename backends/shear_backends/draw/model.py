"""What a picture is made of: boxes of tensors, operators, lines between them, modules around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from shear_ir.axes import Dims
from shear_ir.program import Param
from shear_passes.analysis.find_groups import Group

OpKind = Literal["attention", "product", "add", "mul", "norm", "barrier", "input", "output"]


@dataclass(frozen=True)
class Row:
    """Tensors of one box that have the same dims. ``names``: as the module calls them; ``tied``: their first name."""

    names: tuple[str, ...]
    params: tuple[Param, ...]
    dims: Dims
    tied: str = ""


@dataclass(frozen=True, eq=False)
class Box:
    """The tensors of one module. ``path``: where they live; ``module``: the module the box is drawn in."""

    path: str
    module: str
    title: str
    klass: str
    rows: tuple[Row, ...]

    @property
    def owned(self) -> bool:
        """Whether the box holds parameters, not only buffers."""
        return any(p.kind == "parameter" for row in self.rows for p in row.params)

    def within(self, module: str) -> bool:
        """Whether the tensors are the module's own, not those of a module inside of it."""
        return module == self.path or (module == self.module and self.klass == "parameter")

    @property
    def numel(self) -> int:
        """Parameters that the box holds, those tied to another box included."""
        return sum(p.numel for row in self.rows for p in row.params if p.kind == "parameter")


@dataclass(frozen=True, eq=False)
class Op:
    """An operator that is drawn because it ties axes, joins streams, or stops the analysis."""

    path: str
    module: str
    kind: OpKind
    label: str
    tooltip: str


Item = Box | Op


@dataclass(frozen=True)
class Line:
    """Data flows from one item to another. ``group``: the first prunable one whose axis it carries; ``dims``: as text.

    ``hidden``: not drawn, for it does not carry the group in focus, but it keeps things in their order.
    """

    tail: str
    head: str
    group: Group | None
    dims: str
    hidden: bool = False


@dataclass
class Cluster:
    """A module with what is drawn inside of it. ``times``: the blocks it stands for, in words; empty for one."""

    path: str
    title: str
    klass: str
    times: str = ""
    content: list[Item | Cluster] = field(default_factory=list)

    def items(self) -> Iterator[Item]:
        """Every box and operator inside, depth first."""
        for part in self.content:
            if isinstance(part, Cluster):
                yield from part.items()
            else:
                yield part
