"""Every axis of the parameters, with the slices it owns: what leaves together, and why some cannot leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from shear_ir.axes import Axis, Dim, Dims, Hold, Indices, atoms, evaluate, freeze, owners, resolve, show
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Param, Program
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.roles import Kind, find_roles
from shear_passes.analysis.vanish import FindZeros, Zeros

_SHORT: dict[Kind, str] = {
    "ffn": "ffn", "kv_head": "kv", "query_group": "q", "head_dim": "d", "rotary_pair": "r", "residual": "h",
    "lora_rank": "rank", "expert": "e", "conv_channel": "c", "vocab": "vocab", "other": "a",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One place a group's axis occurs in: a dim of a parameter, whose expression says which index is whose."""

    parameter: str
    dim: int
    expression: Dim
    axis: Axis

    @cached_property
    def index_map(self) -> list[Indices]:
        """Unit that owns each index of the dim, -1 for none; shape ``(size of the dim,)``, nearly always one array."""
        return owners(self.expression, self.axis)


@dataclass(frozen=True, eq=False)
class Group:
    """A prunable axis, or one that would be but for ``reason``. Unit i is index i and the slices it owns."""

    name: str
    kind: Kind
    size: int
    axis: Axis
    slices: tuple[Slice, ...]
    parameters_per_unit: int
    module: str

    @property
    def prunable(self) -> bool:
        """Whether units can be removed as they are."""
        return self.axis.freeze is None

    @property
    def rescalable(self) -> bool:
        """Whether only a norm holds the axis that an exact rescaling can lift."""
        return self.axis.freeze is not None and self.axis.freeze.hold is Hold.NORM

    @property
    def reason(self) -> str:
        """Why units cannot be removed; empty when they can."""
        return "" if self.axis.freeze is None else self.axis.freeze.reason

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


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a program in graph order; iterates over them."""

    program: Program
    axes: Axes
    zeros: Zeros
    all: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    @cached_property
    def by_name(self) -> Mapping[str, Group]:
        """Groups by name."""
        return {g.name: g for g in self.all}

    @cached_property
    def by_axis(self) -> Mapping[Axis, Group]:
        """Groups by axis."""
        return {g.axis: g for g in self.all}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that can lose units."""
        return tuple(g for g in self.all if g.prunable)

    def label(self, atom: Axis) -> str:
        """The name of an atom in text: that of its group; empty when it is in no parameter."""
        group = self.by_axis.get(atom)
        return group.name if group else ""

    def show(self, dim: Dim) -> str:
        """``dim`` as text with the names of the groups."""
        return show(dim, self.label)


@dataclass(frozen=True)
class FindGroups(Analysis[Groups]):
    """Every axis that can lose indices, with the slices it owns in each parameter."""

    requires = (InferAxes, FindZeros)

    def run(self, program: Program, analyses: AnalysisManager) -> Groups:
        """Linear in the number of nodes and parameters."""
        axes = analyses.get(InferAxes())
        zeros = analyses.get(FindZeros())
        slices = _slices(program, axes)
        for atom in slices:
            if atom.freeze is None and atom not in zeros.contracted:
                freeze(atom, "no operator sums over the axis: its entries are only picked or passed on")
        kinds = find_roles(program, axes, zeros, slices)
        return Groups(program, axes, zeros, tuple(_named(program, slices, kinds, axes)))


def _slices(program: Program, axes: Axes) -> dict[Axis, list[Slice]]:
    found: dict[Axis, list[Slice]] = {}
    for name in program.params:
        for place, dim in enumerate(axes.of_param[name]):
            solved = resolve(dim)
            for atom in dict.fromkeys(atoms(solved)):
                found.setdefault(atom, []).append(Slice(name, place, solved, atom))
    return found


def _named(
    program: Program, slices: Mapping[Axis, list[Slice]], kinds: Mapping[Axis, Kind], axes: Axes
) -> Iterator[Group]:
    total = {kind: sum(1 for k in kinds.values() if k == kind) for kind in set(kinds.values())}
    counts: dict[Kind, int] = {}
    for atom, owned in slices.items():
        kind = kinds[atom]
        place = counts[kind] = counts.get(kind, -1) + 1
        name = _SHORT[kind] + (str(place) if total[kind] > 1 else "")
        per_unit = sum(
            _cost(program.params[p], axes.of_param[p], atom) for p in dict.fromkeys(s.parameter for s in owned)
        )
        modules = [s.parameter.rpartition(".")[0] for s in owned if program.params[s.parameter].kind == "parameter"]
        yield Group(name, kind, atom.size, atom, tuple(owned), per_unit, _common(modules))


def _common(paths: Sequence[str]) -> str:
    """The path of the smallest module that holds all of ``paths``."""
    split = [path.split(".") for path in paths]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join(parts[0] for parts in shared)


def _cost(param: Param, dims: Dims, atom: Axis) -> int:
    """Elements of a parameter that go with one unit of the atom."""
    if param.kind != "parameter":
        return 0
    before = after = 1
    for dim in dims:
        before *= dim.size
        after *= evaluate(dim, lambda a: a.size - (a is atom))
    return before - after
