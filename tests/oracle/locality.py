"""An oracle for typing rules that knows nothing of rewriting: no kept entry may hang on a removed one.

A Program runs call by call, at its full size, with the removed slices of every parameter zero. For each call:

- entries said to be zero are zero;
- with noise at the removed entries of what it reads, but for those said to be zero, its kept entries do not move;
- a call that only lays elements out anew keeps as many as it reads;
- a call without shape constants, given the kept entries of what it reads, makes the kept entries of its result.

Call by call this is what makes leaving entries out the same as zeroing them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from shear_ir.axes import ONE, Axis, Dims, Freezes, Hold, Mask, atoms, mask
from shear_ir.frontend.export import trace
from shear_ir.frontend.inputs import Inputs, as_inputs, example_inputs
from shear_ir.manager import AnalysisManager
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.analysis.infer_axes import Axes, InferAxes
from shear_passes.analysis.vanish import FindZeros, Zeros
from shear_passes.ops.norm import WEIGHT_NORMS
from shear_passes.ops.pointwise import pointwise_entry
from shear_passes.ops.registry import entry_of, op_name

Kept = Mapping[Axis, Mask]

_VIEWS = {"aten.view", "aten.reshape", "aten.transpose.int", "aten.permute", "aten.unsqueeze", "aten.flatten.using_ints",
          "aten.unflatten.int", "aten.t", "aten.numpy_T", "aten.movedim.int"}  # fmt: skip


class Unsound(AssertionError):
    """A rule or a law that the numbers contradict."""


def assert_local(model: nn.Module, inputs: Any = None, *, rounds: int = 3, seed: int = 0) -> Groups:
    """Every call of ``model`` is local for ``rounds`` random choices of units from all prunable groups."""
    feed = example_inputs(model) if inputs is None else as_inputs(model, inputs)
    analyses = AnalysisManager(trace(model, feed))
    groups = analyses.get(FindGroups())
    check_calls(model, analyses.get(InferAxes()), analyses.get(FindZeros()), feed, rounds=rounds, seed=seed)
    return groups


def check_calls(model: nn.Module, axes: Axes, zeros: Zeros, feed: Inputs, *, rounds: int = 3, seed: int = 0) -> None:
    """Raise ``Unsound`` where a call contradicts the analyses for a random choice of units of every free axis.

    An axis that only a mean holds is free here: at full size its zeros must do no harm.
    """
    rng = np.random.default_rng(seed)
    dims = [d for dims in axes.of_param.values() for d in dims]
    held = {a: Freezes(zeros.frozen).of(a) for d in dims for a in atoms(d)}
    free = [atom for atom, freeze in held.items() if freeze is None or freeze.hold is Hold.NORM]
    for _ in range(rounds):
        kept = {atom: _some(atom.size, rng) for atom in free}
        _leave_choices(kept, zeros, rng)
        weights = _weights(model, axes.program.constants)
        _Run(axes, zeros, kept, weights, seed).run(*(feed[name] for name in axes.program.inputs))


def forget_outputs(axes: Axes) -> None:
    """Lift what holds the output, so that everything it is made from can go as in the middle of a model."""
    for results in axes.of_node.values():
        for dims in results:
            for atom in (a for d in dims for a in atoms(d)):
                if atom.freeze and atom.freeze.reason.endswith("of an output of the model"):
                    atom.freeze = None


def _some(size: int, rng: np.random.Generator) -> Mask:
    stays = rng.random(size) < 0.6
    stays[rng.integers(size)] = True
    return stays


def _leave_choices(kept: dict[Axis, Mask], zeros: Zeros, rng: np.random.Generator) -> None:
    """Keep more units of the axes of which so many are chosen, until there are enough to choose from."""
    for choice in zeros.choices:
        while choice.open({a: int(stays.sum()) for a, stays in kept.items()}) < choice.count:
            for atom in (a for a in atoms(choice.over) if a in kept and not kept[a].all()):
                kept[atom][rng.choice(np.flatnonzero(~kept[atom]))] = True


def _weights(model: nn.Module, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {**{name: tensor.detach() for name, tensor in named}, **constants}


class _Run(fx.Interpreter):
    def __init__(self, axes: Axes, zeros: Zeros, kept: Kept, weights: Mapping[str, Tensor], seed: int) -> None:
        super().__init__(nn.Module(), graph=axes.program.graph)
        self.axes, self.zeros, self.kept, self.weights = axes, zeros, kept, weights
        self.generator = torch.Generator().manual_seed(seed)
        self.checked = 0

    def run(self, *feeds: Tensor) -> Any:  # type: ignore[override]
        program = self.axes.program
        given = iter(feeds)
        values = []
        for node in program.nodes:
            if node.op == "placeholder":
                param = program.param(node)
                value = next(given) if param is None else self.weights[param.name]
                values.append(value.clone() if param is None else self._masked(node, value))
        with torch.no_grad():
            return super().run(*values, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        # Of what a barrier reads nothing is removed; some read how it lies in memory, which copies do not keep.
        if n.op != "call_function" or n.target is operator.getitem or "empty" in op_name(n) or self._is_barrier(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        # Both before the call, which may write to what it reads.
        disturbed, cut = self._disturbed(n), self._cut_operands(n)
        result = self.call_function(n.target, args, kwargs)
        if n.name in self.zeros.scored:
            result, disturbed = self._lowered(n, result), self._lowered(n, disturbed)
        self._check(n, _snapshot(result), disturbed)
        if cut is not None:
            self._check_cut(n, result, cut)
        return result

    def _is_barrier(self, node: fx.Node) -> bool:
        return node.name in self.axes.barriers

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.topk.default:
            # Unsorted, the same entries may come in another order.
            args = (*args[:4], True)[: len(args)]
        if not _random(target):
            return super().call_function(target, args, kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return super().call_function(target, args, kwargs)

    def _masked(self, node: fx.Node, value: Tensor) -> Tensor:
        dims = self.axes.dims(node)
        if any(user.target in WEIGHT_NORMS and user.args[0] is node for user in node.users):
            # A row of zeros has no direction: the gain of zero removes it.
            over = {a for user in node.users for d in self.axes.dims(user.args[1]) for a in atoms(d)}
            dims = tuple(ONE if set(atoms(d)) & over else d for d in dims)
        stays = self._stays(dims, value.shape)
        return self._lowered(node, torch.where(stays, value, torch.zeros_like(value)))

    def _lowered(self, node: fx.Node, value: Tensor) -> Tensor:
        """``value`` with minus infinity where it scores what was removed."""
        stays = self._stays(self.axes.dims(node), value.shape, self.zeros.scored.get(node.name, frozenset()))
        return value if bool(stays.all()) else value.masked_fill(~stays, -torch.inf)

    def _stays(self, dims: Dims, shape: Sequence[int], only: frozenset[Axis] | None = None) -> Tensor:
        """Which entries of a tensor stay; ``only``: count just the units of these atoms as removed."""
        kept = self.kept if only is None else {a: m for a, m in self.kept.items() if a in only}
        stays = torch.ones(tuple(shape), dtype=torch.bool)
        for place, dim in enumerate(dims):
            along = torch.from_numpy(mask(dim, kept))
            stays &= along.view(-1, *(1 for _ in range(len(dims) - place - 1)))
        return stays

    def _disturbed(self, node: fx.Node) -> Any:
        """The result with noise at all removed entries of the operands that are not said to be zero."""

        def noisy(operand: fx.Node) -> Any:
            value = self.env[operand]
            if not isinstance(value, Tensor):
                return _snapshot(value)
            dims = self.axes.dims(operand)
            stays = self._stays(dims, value.shape)
            states = (self.zeros.made, self.zeros.low, self.zeros.repeated)
            known = frozenset[Axis]().union(*(state.get(operand.name, frozenset()) for state in states))
            where = ~stays & self._stays(dims, value.shape, known)
            return torch.where(where, self._noise(value), value) if bool(where.any()) else value.clone()

        args = fx.map_arg(node.args, noisy)
        kwargs = fx.map_arg(node.kwargs, noisy)
        return self.call_function(node.target, args, kwargs)

    def _cut_operands(self, node: fx.Node) -> Any:
        """The arguments of the call without removed entries; None if it has constants that a rewrite would change."""
        entry = entry_of(node.target) or pointwise_entry(node.target)
        if entry is None or entry.resize is not None or not node.all_input_nodes:
            return None

        def cut(operand: fx.Node) -> Any:
            value = self.env[operand]
            return self._cut(value, self.axes.dims(operand), operand) if isinstance(value, Tensor) else _snapshot(value)

        return fx.map_arg((node.args, node.kwargs), cut)

    def _cut(self, value: Tensor, dims: Dims, node: fx.Node, result: int = 0) -> Tensor:
        for place, dim in enumerate(dims):
            value = value.index_select(place, torch.from_numpy(mask(dim, self.kept).nonzero()[0]))
        named = self.axes.numbers.get((node.name, result))
        if named is None:
            return value.clone()
        stays = torch.from_numpy(mask(named, self.kept))
        if not bool(stays[value.long()].all()):
            raise Unsound(f"a removed index is chosen at %{node.name} = {op_name(node)}")
        return (stays.cumsum(0) - 1)[value.long()].to(value.dtype)

    def _noise(self, value: Tensor) -> Tensor:
        if value.is_floating_point() or value.is_complex():
            return torch.randn(value.shape, generator=self.generator, dtype=value.dtype) * 3
        if value.dtype == torch.bool:
            return torch.rand(value.shape, generator=self.generator) < 0.5
        return value.flatten()[torch.randperm(value.numel(), generator=self.generator)].view(value.shape)

    def _check(self, node: fx.Node, result: Any, disturbed: Any) -> None:
        at = f"%{node.name} = {op_name(node)}"
        for value, other, dims in zip(_all(result), _all(disturbed), self.axes.of_node.get(node.name, []), strict=True):
            self.checked += 1
            stays = self._stays(dims, value.shape)
            zero = ~self._stays(dims, value.shape, self.zeros.made.get(node.name, frozenset()))
            low = ~self._stays(dims, value.shape, self.zeros.low.get(node.name, frozenset()))
            if bool((value[zero & ~low] != 0).any()):
                raise Unsound(f"entries said to be zero are not at {at}")
            if bool((value[low] != -torch.inf).any()):
                raise Unsound(f"entries said to be minus infinity are not at {at}")
            if not self._repeats(value, dims, self.zeros.repeated.get(node.name, frozenset())):
                raise Unsound(f"entries said to be those before them are not at {at}")
            if not _same(value[stays], other[stays]):
                raise Unsound(f"kept entries hang on removed ones at {at}")
            self._count(node, at, stays)

    def _repeats(self, value: Tensor, dims: Dims, only: frozenset[Axis]) -> bool:
        """Whether every removed entry of a vector is equal to the one before it, the first to zero."""
        gone = ~self._stays(dims, value.shape, only)
        return not bool(gone.any()) or torch.equal(value[gone], torch.cat([value.new_zeros(1), value[:-1]])[gone])

    def _check_cut(self, node: fx.Node, result: Any, cut: Any) -> None:
        at = f"%{node.name} = {op_name(node)}"
        try:
            parts = self.call_function(node.target, *cut)
        except (RuntimeError, IndexError) as failure:
            raise Unsound(f"kept entries do not fit together at {at}") from failure
        found = zip(_all(result), _all(parts), self.axes.of_node.get(node.name, []), strict=True)
        for place, (value, part, dims) in enumerate(found):
            if not _same(self._cut(value, dims, node, place), part):
                raise Unsound(f"kept entries alone make another result at {at}")

    def _count(self, node: fx.Node, at: str, stays: Tensor) -> None:
        """A view keeps what it reads, in the same order."""
        if op_name(node) not in _VIEWS or node.name in self.axes.barriers:
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        read = self._stays(self.axes.dims(source), self.env[source].shape)
        if int(read.sum()) != int(stays.sum()):
            raise Unsound(f"{int(read.sum())} entries come in and {int(stays.sum())} stay at {at}")


def _all(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (list, tuple)) else [result]
    return [r for r in results if isinstance(r, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    # What has no value in the original, such as 0 / 0, is nothing to keep.
    return torch.allclose(a, torch.where(a.isnan(), a, b), rtol=1e-4, atol=1e-5, equal_nan=True)


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return [_snapshot(v) for v in value]
    return value


def _random(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
