"""Every axis of the parameters, with the slices it owns: what leaves together, and why some cannot leave."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shear_ir.axes import Axis, Dim, Dims, Freezes, atoms, evaluate, resolve, show
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.paths import common, parent
from shear_ir.plans import Cut
from shear_ir.program import Param, Program
from shear_passes.analysis.block_groups import BLOCK_KINDS, BlockGroup, Gone, Unit, block_groups
from shear_passes.analysis.group import Group, Slice
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.residual_blocks import Block, FindBlocks
from shear_passes.analysis.roles import Kind, find_roles
from shear_passes.analysis.vanish import FindZeros, Zeros
from shear_passes.analysis.weight_norms import weight_norms

_SHORT: dict[Kind, str] = {
    "ffn": "ffn", "kv_head": "kv", "query_group": "q", "head_dim": "d", "rotary_pair": "r", "residual": "h",
    "lora_rank": "rank", "expert": "e", "conv_channel": "c", "vocab": "vocab", "other": "a",
    "block": "block", "attention_block": "attn", "mlp_block": "mlp",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a program in graph order, those of axes and then those of blocks; iterates over them."""

    program: Program
    axes: Axes
    zeros: Zeros
    of_axes: tuple[Group, ...]
    blocks: tuple[BlockGroup, ...] = ()

    @cached_property
    def all(self) -> tuple[Group, ...]:
        """Every group."""
        return (*self.of_axes, *self.blocks)

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
        return {g.axis: g for g in self.of_axes}

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

    def units(self, cuts: Iterable[Cut]) -> list[Unit]:
        """The blocks that these cuts remove."""
        return [self._blocks[c.group].units[i] for c in cuts if c.kind in BLOCK_KINDS for i in c.removed]

    def names_without(self, gone: Gone) -> dict[str, str]:
        """The names that groups of axes have in what is left without ``gone``, each with the name it has here."""
        left = (name for name in self.program.params if name not in gone.parameters)
        dims = (resolve(dim) for name in left for dim in self.axes.of_param[name])
        groups = [self.by_axis[atom] for atom in dict.fromkeys(atom for dim in dims for atom in atoms(dim))]
        return {name: group.name for name, group in zip(_names([g.kind for g in groups]), groups, strict=True)}

    @cached_property
    def _blocks(self) -> Mapping[str, BlockGroup]:
        return {g.name: g for g in self.blocks}


@dataclass(frozen=True)
class FindGroups(Analysis[Groups]):
    """Every axis that can lose indices, with the slices it owns in each parameter."""

    requires = (InferAxes, FindZeros, FindBlocks)

    def run(self, program: Program, analyses: AnalysisManager) -> Groups:
        """Linear in the number of nodes and parameters."""
        axes = analyses.get(InferAxes())
        zeros = analyses.get(FindZeros())
        slices = _slices(program, axes)
        freezes = Freezes(zeros.frozen)
        for atom in slices:
            if freezes.of(atom) is None and atom not in zeros.contracted and atom not in zeros.routers:
                freezes.add(atom, "no operator sums over the axis: its entries are only picked or passed on")
        kinds = find_roles(program, axes, zeros, slices)
        named = tuple(_named(program, slices, kinds, axes, zeros, freezes))
        found: tuple[Block, ...] = analyses.get(FindBlocks())
        blocks = list(block_groups(program, axes, found))
        return Groups(program, axes, zeros, named, tuple(map(_called, blocks, _names([b.kind for b in blocks]))))


def _called(group: BlockGroup, name: str) -> BlockGroup:
    return replace(group, name=name)


def _slices(program: Program, axes: Axes) -> dict[Axis, list[Slice]]:
    found: dict[Axis, list[Slice]] = {}
    # Of ``g * v / |v|`` a row goes by a zero of g.
    rows = {(v, d) for g, v in weight_norms(program) for d, dim in enumerate(axes.of_param[g]) if dim.size > 1}
    for name in program.params:
        for place, dim in enumerate(axes.of_param[name]):
            solved = resolve(dim)
            for atom in dict.fromkeys(atoms(solved)):
                spared = (name, place) in rows
                found.setdefault(atom, []).append(Slice(name, place, solved, atom, spared=spared))
    return found


def _named(
    program: Program, slices: Mapping[Axis, list[Slice]], kinds: Mapping[Axis, Kind], axes: Axes, zeros: Zeros,
    freezes: Freezes,
) -> Iterator[Group]:  # fmt: skip
    names = _names([kinds[atom] for atom in slices])
    least, multiples = _least(zeros), _multiples(axes)
    for name, (atom, owned) in zip(names, slices.items(), strict=True):
        kind = kinds[atom]
        per_unit = sum(
            _cost(program.params[p], axes.of_param[p], atom) for p in dict.fromkeys(s.parameter for s in owned)
        )
        modules = [parent(s.parameter) for s in owned if program.params[s.parameter].kind == "parameter"]
        yield Group(
            name, kind, atom.size, atom, tuple(owned), per_unit, common(modules),
            least=least.get(atom, 1), multiple=multiples.get(atom, 1), freeze=freezes.of(atom),
        )  # fmt: skip


def _least(zeros: Zeros) -> dict[Axis, int]:
    """How many units of an axis have to stay for the choices among them."""
    found: dict[Axis, int] = {}
    for choice in zeros.choices:
        for atom in set(atoms(choice.over)):
            found[atom] = max(found.get(atom, 1), choice.least(atom))
    return found


def _multiples(axes: Axes) -> dict[Axis, int]:
    """The number of units of an axis by which every dim that is aligned now may change and still be so."""
    found: dict[Axis, int] = {}
    for dim, multiple, _ in axes.aligned:
        for atom in set(atoms(dim)) if dim.size % multiple == 0 else ():
            each = dim.size - evaluate(dim, lambda a, atom=atom: a.size - (a is atom))  # type: ignore[misc]
            found[atom] = math.lcm(found.get(atom, 1), multiple // math.gcd(multiple, each))
    return found


def _names(kinds: Sequence[Kind]) -> list[str]:
    """A name for each group: that of its kind, with a number where there are several."""
    total, counts = Counter(kinds), Counter[Kind]()
    found = []
    for kind in kinds:
        found.append(_SHORT[kind] + (str(counts[kind]) if total[kind] > 1 else ""))
        counts[kind] += 1
    return found


def _cost(param: Param, dims: Dims, atom: Axis) -> int:
    """Elements of a parameter that go with one unit of the atom."""
    if param.kind != "parameter":
        return 0
    before = after = 1
    for dim in dims:
        before *= dim.size
        after *= evaluate(dim, lambda a: a.size - (a is atom))
    return before - after


__all__ = ["BLOCK_KINDS", "BlockGroup", "FindGroups", "Gone", "Group", "Groups", "Slice", "Unit"]
