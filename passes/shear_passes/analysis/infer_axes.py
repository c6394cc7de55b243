"""The dims of every value and parameter, by one walk over the graph that solves each operator's equations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import fx

import shear_passes.ops  # noqa: F401  # registers every rule
from shear_ir.axes import Axis, Dim, Dims, atoms, axis, freeze, resolve
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.nodes import module_stack
from shear_ir.program import Program
from shear_passes.analysis.memory import undecided
from shear_passes.ops.pointwise import DimsTuple, is_dims, pointwise_entry
from shear_passes.ops.registry import (
    Barrier,
    Contraction,
    Entry,
    Need,
    Operand,
    Ranking,
    Results,
    Site,
    Vanish,
    entry_of,
    op_name,
)
from shear_passes.ops.traits import Asks, traits_of

_EXACT = {torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
"""Types that hold the numbers of any axis."""


@dataclass(frozen=True, eq=False)
class Axes:
    """The solution: dims by node (one tuple per tensor result) and by parameter name.

    ``contractions`` in graph order; ``vanish`` is each call's law; ``barriers`` are calls without a rule.
    ``rankings``: where entries along an axis are compared, for axes whose indices are chosen by that; ``numbers``: the
    dims whose indices the entries of integer values number, by node and result. ``aligned``: dims that a kernel wants
    to be a multiple of some number: of one that is right in half precision too, where they are now, and of one that it
    needs in the precision of the trace.
    """

    program: Program
    of_node: Mapping[str, Results]
    of_param: Mapping[str, Dims]
    contractions: tuple[Contraction, ...]
    vanish: Mapping[str, Vanish]
    barriers: Mapping[str, str]
    rankings: tuple[Ranking, ...] = ()
    numbers: Mapping[tuple[str, int], Dim] = field(default_factory=dict)
    aligned: tuple[tuple[Dim, int, int], ...] = ()

    @cached_property
    def from_inputs(self) -> frozenset[fx.Node]:
        """The values that some input of the model went into; the others are made of parameters alone."""
        found: set[fx.Node] = set()
        for node in self.program.nodes:
            given = node.op == "placeholder" and self.program.param(node) is None
            if given or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    def dims(self, node: fx.Node) -> Dims:
        """Dims of a node with one tensor result; empty for any other node."""
        results = self.of_node.get(node.name, [])
        return results[0] if len(results) == 1 else ()


@dataclass(frozen=True)
class InferAxes(Analysis[Axes]):
    """Hindley-Milner for tensor dimensions: fresh atoms for the parameters, one rule per operator."""

    def run(self, program: Program, analyses: AnalysisManager) -> Axes:
        """Linear in the number of nodes; independent of widths."""
        return Inference(program).run()


class Inference:
    """The walk: ``of_node`` has the dims of what was seen so far; ``call`` types one more call."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of_node: dict[str, Results] = {}
        self.of_param = {p.name: tuple(axis(s) for s in p.type.shape) for p in program.params.values()}
        self.contractions: list[Contraction] = []
        self.vanish: dict[str, Vanish] = {}
        self.barriers: dict[str, str] = {}
        self.rankings: list[Ranking] = []
        self.aligned: list[tuple[Dim, int, int]] = []
        # By node and result.
        self.numbers: dict[tuple[str, int], Dim] = {}
        self._entries: dict[Any, Entry | None] = {}

    def run(self) -> Axes:
        for node in self.program.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                self._hold_unchosen()
                self._hold_undecided()
                self._hold_other_ways()
                self._output(node)
        solved = _Solution()
        return Axes(
            program=self.program,
            of_node={name: [solved.dims(dims) for dims in results] for name, results in self.of_node.items()},
            of_param={name: solved.dims(dims) for name, dims in self.of_param.items()},
            contractions=tuple([solved.contraction(made) for made in self.contractions]),
            vanish=self.vanish,
            barriers=self.barriers,
            rankings=tuple([replace(r, over=resolve(r.over)) for r in self.rankings]),
            numbers={value: resolve(dim) for value, dim in self.numbers.items()},
            aligned=tuple([(resolve(dim), multiple, needed) for dim, multiple, needed in self.aligned]),
        )

    def _hold_unchosen(self) -> None:
        """Comparing entries holds an axis, unless its indices are chosen by it: then removed ones may just lose.

        A softmax chooses among what is stacked along its axis: matrices, which it weighs.
        """
        stacked = {a for dims in self.of_param.values() for a in _stacked(dims)}
        self.rankings = [
            replace(r, named=r.named or (r.need is Need.WEIGHTLESS and stacked.issuperset(atoms(r.over))))
            for r in self.rankings
        ]
        chosen = {a for r in self.rankings if r.named for a in atoms(r.over)}
        for ranking in self.rankings:
            for atom in atoms(ranking.over):
                if atom not in chosen:
                    freeze(atom, ranking.reason, at=ranking.node.name)

    def _hold_other_ways(self) -> None:
        """What the code of a module has in hand stays whole where its forward has ways that were not traced.

        That is what it is given, what it makes by itself and what it hands from one of its modules to another.
        """
        for node in self.program.nodes if self.program.held else ():
            for path, value in _in_hand(node, self.program):
                held = self.program.held.get(path)
                for dims in self.of_node.get(value.name, ()) if held is not None else ():
                    for dim in dims:
                        if held is not None and (held.sizes is None or dim.size in held.sizes):
                            freeze(dim, held.reason, at=node.name)

    def _hold_undecided(self) -> None:
        for call, home in undecided(self.program):
            reason = f"%{call.name} = {op_name(call)} may or may not be a copy of what is written to in place"
            # Layouts pass through calls, so whatever the memory is made of may have chosen it.
            held, todo = {call, home}, [call, home]
            for value in todo:
                above = [n for n in value.all_input_nodes if n not in held and self.program.param(n) is None]
                held.update(above)
                todo.extend(above)
                for dims in self.of_node.get(value.name, []):
                    for dim in dims:
                        freeze(dim, reason, at=call.name)

    def _placeholder(self, node: fx.Node) -> None:
        param = self.program.param(node)
        if param is not None:
            self.of_node[node.name] = [self.of_param[param.name]]
            return
        kind = self.program.type(node)
        dims = tuple(axis(s) for s in kind.shape) if kind else ()
        for place, dim in enumerate(dims):
            freeze(dim, f"dim {place} of the input {node.name}", at=node.name)
        self.of_node[node.name] = [dims]

    def _output(self, node: fx.Node) -> None:
        def hold(value: fx.Node) -> fx.Node:
            for dims in self.of_node.get(value.name, []):
                for place, dim in enumerate(dims):
                    freeze(dim, f"dim {place} of an output of the model", at=node.name)
            return value

        fx.map_arg(node.args, hold)
        self._hold_numbers(node, "named by the numbers of an output of the model")

    def call(self, node: fx.Node) -> None:
        """Type one call by its rule, given the dims of what it reads."""
        if getattr(node.target, "__name__", "") == "getitem":
            source, place = node.args
            assert isinstance(source, fx.Node)
            if source.name in self.of_node:
                self.of_node[node.name] = [self.of_node[source.name][place]]  # type: ignore[index]
                self.vanish[node.name] = Vanish.MOVED
            if (source.name, place) in self.numbers:
                self.numbers[node.name, 0] = self.numbers[source.name, place]  # type: ignore[index]
            return
        shapes = tuple(t.shape for t in self.program.types.get(node.name, ()))
        entry = self._entry(node.target)
        if not shapes and entry is None:
            self._without_result(node)
            return
        numbers = {n: self.numbers[n.name, 0] for n in node.all_input_nodes if (n.name, 0) in self.numbers}
        site = Site(node, shapes, Vanish.NEVER if entry is None else entry.vanish, numbers=numbers)
        self.of_node[node.name] = self._typed(site, entry)
        self.vanish[node.name] = site.vanish
        self.contractions.extend(site.contractions)
        self.rankings.extend(site.rankings)
        itemsize = self.program.types[node.name][0].dtype.itemsize if site.aligned else 1
        for dim, bytes in site.aligned:
            half = bytes // 2
            needed = bytes // itemsize
            self.aligned.append((dim, half if dim.size % half == 0 else needed, needed))
        self._follow_numbers(site)

    def _follow_numbers(self, site: Site) -> None:
        """Numbers that only move keep their meaning; a call that does anything else with them holds what they name."""
        if site.node.name in self.barriers:
            site.understood.clear()
            site.made_numbers.clear()
        elif site.vanish is Vanish.MOVED and not site.made_numbers and self._keeps_numbers(site.node):
            first = site.named_by(site.node.args[0])
            if first is not None:
                site.name(first)
        self.numbers.update({(site.node.name, place): dim for place, dim in site.made_numbers.items()})
        reason = f"numbers of its indices are used at {site.where}"
        self._hold_numbers(site.node, reason, site.understood)

    def _keeps_numbers(self, node: fx.Node) -> bool:
        """Whether the entries of a result are entries of the first operand, as exact as they were."""
        return not traits_of(node).fills_in and all(t.dtype in _EXACT for t in self.program.types[node.name])

    def _hold_numbers(self, node: fx.Node, reason: str, understood: Collection[fx.Node] = ()) -> None:
        for operand in node.all_input_nodes:
            if (operand.name, 0) in self.numbers and operand not in understood:
                freeze(self.numbers[operand.name, 0], reason, at=node.name)

    def _entry(self, target: Any) -> Entry | None:
        if target not in self._entries:
            self._entries[target] = entry_of(target) or pointwise_entry(target)
        return self._entries[target]

    def _typed(self, site: Site, entry: Entry | None) -> Results:
        if entry is None:
            return self._barrier(site, f"no axis rule for {op_name(site.node)}")
        try:
            result = entry.rule(site, *self._arguments(site.node.args), **self._arguments(site.node.kwargs))
        except Barrier as barrier:
            return self._barrier(site, str(barrier))
        results = result if isinstance(result, list) else [result]
        sizes = tuple([tuple([d.size for d in dims]) for dims in results])
        if sizes != site.shapes:
            return self._barrier(site, f"the axis rule for {op_name(site.node)} gives {sizes}, not {site.shapes}")
        return results

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            results = self.of_node.get(value.name)
            return DimsTuple(results[0]) if results is not None and len(results) == 1 else value
        if isinstance(value, dict):
            return {key: self._arguments(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._arguments(item) for item in value]
        return tuple(self._arguments(item) for item in value) if isinstance(value, tuple) else value

    def _barrier(self, site: Site, reason: str) -> Results:
        self.barriers[site.node.name] = reason
        results = [site.fresh(shape) for shape in site.shapes]
        site.freeze([dim for dims in results for dim in dims], reason)
        self._freeze_operands(site, reason)
        return results

    def _freeze_operands(self, site: Site, reason: str) -> None:
        def hold(value: fx.Node) -> fx.Node:
            for dims in self.of_node.get(value.name, []):
                site.freeze(dims, reason)
            return value

        fx.map_arg((site.node.args, site.node.kwargs), hold)

    def _without_result(self, node: fx.Node) -> None:
        """A call that makes no tensor: arithmetic on sizes says nothing, anything that reads values holds its axes."""
        name, asks = op_name(node), traits_of(node).asks
        if asks is not Asks.SIZE:
            self._hold_numbers(node, f"numbers of its indices are read at %{node.name} = {name}")
        if asks is not None or not isinstance(node.target, torch._ops.OpOverload):
            if asks is not Asks.SIZE and any(n.name in self.of_node for n in node.all_input_nodes):
                self._barrier(Site(node, ()), f"{name} reads a size")
            return
        self._barrier(Site(node, ()), f"{name} reads values")


def _in_hand(node: fx.Node, program: Program) -> Iterator[tuple[str, fx.Node]]:
    """The modules whose code sees a value on its way to ``node``, or what ``node`` makes, each with the value."""
    here = module_stack(node)
    yield here[-1], node
    for value in node.all_input_nodes:
        if program.param(value) is not None:
            yield here[-1], value  # a parameter is read where it is used
            continue
        there = module_stack(value)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(there, here, strict=False)))
        # The innermost module around both hands it on; those further in, on either side, return it or are given it.
        for path in {*there[shared - 1 :], *here[shared - 1 :]}:
            yield path, value


def _stacked(dims: Dims) -> list[Axis]:
    """The atom that counts the matrices, or kernels, in a parameter of three dims or more; none in any other."""
    large = [resolve(dim) for dim in dims if dim.size > 1]
    return [large[0]] if len(large) > 2 and isinstance(large[0], Axis) else []


class _Solution:
    """Dims in normal form, each resolved once; those that were one object are one object afterwards."""

    def __init__(self) -> None:
        self._dim: dict[int, Dim] = {}
        self._dims: dict[int, Dims] = {}
        self._alive: list[Any] = []  # what the numbers above stand for

    def dims(self, dims: Dims) -> Dims:
        """A tuple of dims, solved."""
        if id(dims) not in self._dims:
            self._dims[id(dims)] = tuple([self._solved(dim) for dim in dims])
            self._alive.append(dims)
        return self._dims[id(dims)]

    def contraction(self, made: Contraction) -> Contraction:
        """A contraction over solved dims."""
        operands = tuple([Operand(o.node, self.dims(o.free)) for o in made.operands])
        return replace(made, over=self.dims(made.over), operands=operands)

    def _solved(self, dim: Dim) -> Dim:
        if id(dim) not in self._dim:
            solved = resolve(dim)
            self._dim[id(dim)] = self._dim[id(solved)] = solved
            self._alive.append((dim, solved))
        return self._dim[id(dim)]


def frozen_names(axes: Axes, node: fx.Node) -> list[Axis]:
    """The atoms that a barrier holds: those of everything it reads."""
    return [a for n in node.all_input_nodes for dims in axes.of_node.get(n.name, []) for d in dims for a in atoms(d)]


__all__ = ["Axes", "InferAxes", "frozen_names", "is_dims"]
