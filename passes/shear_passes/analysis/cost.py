"""What a model takes: parameters, bytes, FLOPs per token, cache bytes per token, as functions of its axes' sizes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from shear_ir.axes import Axis, Dim, Product, atoms, evaluate, resolve
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.plans import Costs
from shear_ir.program import Program
from shear_passes.analysis.block_groups import NOTHING, Gone
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.roles import attention_products
from shear_passes.analysis.vanish import FindZeros, Zeros
from shear_passes.ops.registry import Contraction

Size = Callable[[Axis], int]
Polynomial = Counter[tuple[Axis, ...]]
"""A number as a sum of coefficients times products of sizes: the atoms of each product, and its coefficient."""


@dataclass(frozen=True, eq=False)
class CostModel:
    """Evaluates costs for any sizes of the axes; nothing is traced or run again."""

    program: Program
    axes: Axes
    zeros: Zeros

    def at(self, sizes: Mapping[Axis, int], gone: Gone = NOTHING) -> Costs:
        """Costs when the given axes have other sizes, and without what is ``gone`` with whole blocks."""

        def size(atom: Axis) -> int:
            return sizes.get(atom, atom.size)

        return Costs(
            self.parameters(size, gone), self._bytes(size, gone), self._flops(size, gone), self._kv_bytes(size, gone)
        )

    @cached_property
    def _terms(self) -> dict[frozenset[Axis], dict[str, Polynomial]]:
        return {}

    @cached_property
    def now(self) -> Costs:
        """Costs of the model as it is."""
        return self.at({})

    def parameters(self, size: Size, gone: Gone = NOTHING) -> int:
        """Number of parameters, tied ones once."""
        return sum(
            math.prod(evaluate(d, size) for d in self.axes.of_param[p.name])
            for p in self.program.params.values()
            if p.kind == "parameter" and p.name not in gone.parameters
        )

    def parameters_in(self, atoms: Collection[Axis], gone: Gone = NOTHING) -> Callable[[Mapping[Axis, int]], int]:
        """The number of parameters as a function of these atoms' sizes alone, much quicker to evaluate."""
        key = frozenset(atoms)
        if key not in self._terms:
            self._terms[key] = {
                param.name: _product([_polynomial(resolve(d), key) for d in self.axes.of_param[param.name]])
                for param in self.program.params.values()
                if param.kind == "parameter"
            }
        total = Polynomial()
        for name, terms in self._terms[key].items():
            if name not in gone.parameters:
                total.update(terms)
        return lambda sizes: sum([factor * math.prod([sizes[a] for a in term]) for term, factor in total.items()])

    def _bytes(self, size: Size, gone: Gone) -> int:
        return sum(
            math.prod(evaluate(d, size) for d in self.axes.of_param[p.name]) * p.type.dtype.itemsize
            for p in self.program.params.values()
            if p.kind != "constant" and p.persistent and p.name not in gone.parameters
        )

    def _flops(self, size: Size, gone: Gone) -> int:
        made = self.axes.contractions
        counted = [
            (len(c.operands) == 2 or (c.mixed and len(c.operands) == 1)) and c.node.name not in gone.nodes for c in made
        ]
        total = sum(self._flops_of(c, made[i + c.inner], size) for i, c in enumerate(made) if counted[i])
        return 2 * total // self._samples()

    def _flops_of(self, made: Contraction, reader: Contraction, size: Size) -> int:
        """Multiply-adds of one contraction; inside of a call its value has the dims that its reader sums over."""
        if made is reader:
            return _volume(self.axes.dims(made.node), size) * _volume(made.over, size)
        return _volume((*made.operands[0].free, *reader.over, *made.over), size)

    def _samples(self) -> int:
        """Tokens in the traced input, or samples where the input is not tokens."""
        for kind in self.program.input_types.values():
            return math.prod(kind.shape) if not kind.dtype.is_floating_point else (*kind.shape, 1)[0]
        return 1

    def _kv_bytes(self, size: Size, gone: Gone) -> int:
        return sum(
            # Dims without a live atom are batch and positions, however they are composed.
            _volume(dims, lambda a, live=live: size(a) if a in live else 1) * itemsize  # type: ignore[misc]
            for name, dims, live, itemsize in self._cached
            if name not in gone.nodes
        )

    @cached_property
    def _cached(self) -> list[tuple[str, list[Dim], Collection[Axis], int]]:
        """Keys and values that a cache keeps: name, dims, the atoms they live on, and bytes per element."""
        if not self.program.caches:
            return []
        scores, mixes = attention_products(self.axes, self.zeros)
        # Keys are the second factor of the scores; values the last of the mixes.
        kept = [(made.operands[1], made.over) for made in scores]
        kept += [(made.operands[-1], ()) for made in mixes]
        found: list[tuple[str, list[Dim], Collection[Axis], int]] = []
        for operand, over in kept:
            live = self.zeros.of_node.get(operand.node.name, frozenset())
            kind = self.program.type(operand.node)
            if live and kind is not None:
                dims = [d for d in (*operand.free, *over) if any(a in live for a in atoms(d))]
                found.append((operand.node.name, dims, live, kind.dtype.itemsize))
        return found


@dataclass(frozen=True)
class MeasureCosts(Analysis[CostModel]):
    """The cost model of a program."""

    requires = (InferAxes, FindZeros)

    def run(self, program: Program, analyses: AnalysisManager) -> CostModel:
        """Nothing is evaluated yet."""
        return CostModel(program, analyses.get(InferAxes()), analyses.get(FindZeros()))


def _polynomial(dim: Dim, atoms: Collection[Axis]) -> Polynomial:
    if isinstance(dim, Axis):
        return Polynomial({(dim,): 1} if dim in atoms else {(): dim.size})
    if isinstance(dim, Product):
        return _product([_polynomial(f, atoms) for f in dim.factors])
    total = Polynomial()
    for part in dim.parts:
        total.update(_polynomial(part, atoms))
    return total


def _product(factors: Iterable[Polynomial]) -> Polynomial:
    total = Polynomial({(): 1})
    for factor in factors:
        product = Polynomial()
        for (left, a), (right, b) in itertools.product(total.items(), factor.items()):
            product[tuple(sorted((*left, *right), key=lambda atom: atom.id))] += a * b
        total = product
    return total


def _volume(dims: Iterable[Dim], size: Size) -> int:
    return math.prod(evaluate(d, size) for d in dims)
