"""Who reads a unit: every product that sums a parameter with a value over a dim, found from the graph by operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from shear_ir.axes import Axis, Dim, atoms
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.nodes import module_path
from shear_ir.paths import parent
from shear_ir.program import Param, Program
from shear_passes.analysis.find_groups import Group
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.ops.registry import Vanish, wrap
from shear_passes.ops.traits import WeightedProduct, traits_of

Key = tuple[str, int]
"""A parameter and the dim of it that is summed over."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """A parameter that is multiplied with a value and summed over its ``dim``.

    ``features``: the expression of the dim of the value that is summed over, which for a convolution in groups is
    that of all of its channels; ``axes``: the atoms that the sum runs over. ``sources``: names of the values that are
    read; ``feature``: the place of their features, counted from the back. ``groups``: those of a convolution.
    ``modules``: paths of the modules that own the parameter and take a source as their input; None where some read
    is not of that form. ``sole``: nothing else is done with the parameter, as with an embedding tied to its head.
    """

    parameter: str
    dim: int
    features: Dim
    axes: frozenset[Axis]
    sources: frozenset[str]
    feature: int
    groups: int = 1
    modules: frozenset[str] | None = frozenset()
    sole: bool = True

    @property
    def key(self) -> Key:
        """What tells consumers apart."""
        return self.parameter, self.dim

    def matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as ``(rows, features)``: a row for every output, kernel position and expert."""
        if self.groups == 1:
            return weight.movedim(self.dim, -1).reshape(-1, weight.shape[self.dim])
        # (g·o, i, k) of a grouped convolution reads channel g·i: columns (g, i), rows (o, k).
        split = weight.reshape(self.groups, -1, weight.shape[1], weight[0, 0].numel())
        return split.permute(1, 3, 0, 2).reshape(-1, self.groups * weight.shape[1])

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """``values`` of shape ``(features,)``, each where ``weight`` reads its feature; broadcasts to the weight."""
        if self.groups == 1:
            shape = [1] * weight.dim()
            shape[self.dim] = -1
            return values.reshape(shape)
        each = values.reshape(self.groups, 1, weight.shape[1])
        rows = each.expand(-1, weight.shape[0] // self.groups, -1).reshape(weight.shape[:2])
        return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


@dataclass(frozen=True, eq=False)
class Consumers:
    """Every consumer by parameter and dim, in graph order."""

    all: Mapping[Key, Consumer]

    def __iter__(self) -> Iterator[Consumer]:
        return iter(self.all.values())

    def of(self, group: Group) -> tuple[Consumer, ...]:
        """The consumers that sum over the axis of ``group``; none where nothing that is understood reads it."""
        return tuple(c for c in self if group.axis in c.axes)


@dataclass(frozen=True)
class FindConsumers(Analysis[Consumers]):
    """One walk over the contractions: which operand is a parameter, and which the value it reads."""

    requires = (InferAxes,)

    def run(self, program: Program, analyses: AnalysisManager) -> Consumers:
        """Linear in the number of contractions."""
        axes = analyses.get(InferAxes())
        found: dict[Key, Consumer] = {}
        readers: dict[Key, set[fx.Node]] = {}
        for node, read in _reads(program, axes):
            known = found.get(read.key)
            found[read.key] = read if known is None else _joined(known, read)
            readers.setdefault(read.key, set()).add(node)
        return Consumers({k: replace(c, sole=_uses(program, axes, k[0]) <= readers[k]) for k, c in found.items()})


def _uses(program: Program, axes: Axes, name: str) -> set[fx.Node]:
    """The calls that do something with a parameter, but for views of it."""
    found: set[fx.Node] = set()
    stack = [program.placeholder_of[name]]
    while stack:
        for user in stack.pop().users:
            moved = axes.vanish.get(user.name) is Vanish.MOVED
            (stack.append if moved else found.add)(user)
    return found


def _joined(a: Consumer, b: Consumer) -> Consumer:
    """The same parameter read twice, as by layers that share it."""
    modules = None if a.modules is None or b.modules is None else a.modules | b.modules
    return replace(a, axes=a.axes | b.axes, sources=a.sources | b.sources, modules=modules)


def _reads(program: Program, axes: Axes) -> Iterator[tuple[fx.Node, Consumer]]:
    for node in dict.fromkeys(made.node for made in axes.contractions):
        for form in _forms(axes, node):
            value, weight = node.args[form.value], node.args[form.weight]
            if not isinstance(value, fx.Node) or not isinstance(weight, fx.Node):
                continue
            origin = _origin(axes, weight, form.dim)
            if origin is None or _owner(program, axes, value):
                continue
            param, dim = origin
            source, inside = _source(program, axes, value, module_path(node), form.feature)
            summed = [c.over for c in axes.contractions if c.node is node and not c.inner and not c.mixed]
            over = frozenset(a for dims in summed for d in dims for a in atoms(d))
            features = axes.dims(value)[form.feature]
            mine = over & frozenset(atoms(axes.of_param[param.name][dim]))
            paths = None if inside else _paths(param, module_path(node))
            read = Consumer(param.name, dim, features, mine, frozenset({source}), form.feature, form.groups, paths)
            yield node, read


def _forms(axes: Axes, node: fx.Node) -> list[WeightedProduct]:
    """The ways in which a call can be a weight times a value; one of its operands turns out to be the weight."""
    products = traits_of(node).products
    return [] if products is None else products(node, lambda operand: len(axes.dims(operand)))


def _origin(axes: Axes, node: fx.Node, dim: int) -> tuple[Param, int] | None:
    """The parameter that ``node`` is a view or a choice of experts of, and the dim there that is ``dim`` here."""
    dim = wrap(dim, len(axes.dims(node)))
    while axes.program.param(node) is None:
        source = node.args[0] if node.args else None
        back = _moved(axes, node, source, dim) if isinstance(source, fx.Node) else None
        if back is None:
            return None
        assert isinstance(source, fx.Node)
        node, dim = source, back
    param = axes.program.param(node)
    return (param, dim) if param is not None and param.kind == "parameter" else None


def _moved(axes: Axes, node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """The dim of ``source`` that is the dim ``dim`` of ``node``; None where that is not plain."""
    row, rank, before = traits_of(node), len(axes.dims(node)), len(axes.dims(source))
    if row.converts:
        return dim
    if row.order is not None:
        return row.order(node, rank)[dim]
    if row.leads:
        # What is chosen or repeated stands before the matrix, whose dims stay the last two.
        place = before - (rank - dim)
        same = place >= max(0, before - 2) and dim >= rank - 2
        return place if same and axes.dims(source)[place] == axes.dims(node)[dim] else None
    return None


def _owner(program: Program, axes: Axes, node: fx.Node) -> bool:
    """Whether a value is made of parameters alone."""
    while axes.vanish.get(node.name) is Vanish.MOVED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return program.param(node) is not None


def _source(program: Program, axes: Axes, value: fx.Node, path: str, feature: int) -> tuple[str, bool]:
    """The value that comes into the module ``path`` and is read there, and whether it is made inside instead."""
    node = value
    while node.op == "call_function" and module_path(node) == path:
        source = node.args[0] if node.args else None
        moved = axes.vanish.get(node.name) is Vanish.MOVED and isinstance(source, fx.Node)
        if not moved or axes.dims(source)[feature] != axes.dims(node)[feature]:  # type: ignore[arg-type]
            return value.name, True
        assert isinstance(source, fx.Node)
        node = source
    return node.name, not path


def _paths(param: Param, path: str) -> frozenset[str] | None:
    """The module ``path``, if it owns the parameter by any of its names, or is an adapter's layer around the owner."""
    owners = {parent(name) for name in (param.name, *param.aliases)}
    mine = {owner for owner in owners if owner == path or owner == f"{path}.base_layer"}
    return frozenset(mine) or None
