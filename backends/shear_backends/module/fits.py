"""Sizes that forward takes from elsewhere than an attribute, such as the width of its input: mended where they fail.

``attn_output.reshape(batch, length, hidden_states.size(-1))`` says that all heads together are as wide as the input.
Once heads are gone they are not, and no attribute says otherwise. The graph knows what the size has to be, so the
module's views and splits of that form get it whenever the size that was asked for cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from shear_ir.axes import Axis, Dim, Mask, atoms, evaluate
from shear_ir.nodes import module_path
from shear_passes.analysis.find_groups import Groups

Shape = tuple[int, ...]

_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
_UNFLATTENS = (Tensor.unflatten, torch.unflatten)
_SPLITS = (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
_CHUNKS = (Tensor.chunk, torch.chunk)
_OPEN = -1
"""A size that is not said: one that takes the rest, or one of an operand that has batch or length in it."""


@dataclass(frozen=True)
class Fit:
    """In ``module``, ``rank`` sizes of which those at ``places`` are ``old`` and do not fit are meant as ``new``.

    ``operand``: the shape of what is viewed or split, after the cut, -1 where batch or length decide it.
    """

    module: str
    rank: int
    places: Shape
    old: Shape
    new: Shape
    operand: Shape = ()

    def of(self, sizes: Shape) -> Shape | None:
        """``sizes`` with the new ones, but for one left open; None where they are not those of the dense model."""
        if len(sizes) != self.rank:
            return None
        given = [sizes[place] for place in self.places]
        if any(size not in (old, _OPEN) for size, old in zip(given, self.old, strict=True)):
            return None
        changed = dict(zip(self.places, self.new, strict=True))
        return tuple(changed.get(p, s) if s != _OPEN else s for p, s in enumerate(sizes))

    def reads(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape may be the operand."""
        return len(shape) == len(self.operand) and all(
            known in (size, _OPEN) for size, known in zip(shape, self.operand, strict=True)
        )


def find_fits(groups: Groups, masks: Mapping[Axis, Mask]) -> tuple[Fit, ...]:
    """What the plan changes in the sizes of each module's views and splits."""
    counts = {atom: int(stays.sum()) for atom, stays in masks.items()}
    given = {atom for node in _inputs(groups) for dim in groups.axes.dims(node) for atom in atoms(dim)}
    found: dict[Fit, None] = {}
    for node in groups.program.calls():
        dims = list(_sized(groups, node))
        old = [dim.size for dim in dims]
        new = [evaluate(dim, lambda a: counts.get(a, a.size)) for dim in dims]
        places = tuple(place for place in range(len(dims)) if old[place] != new[place])
        if places and _name(node) in ("split", "chunk"):
            places = tuple(range(len(dims)))  # what is said is one number, which stands for all of the sizes
        # A size with batch or length in it is another one at the next input.
        if places and not any(given.intersection(atoms(dims[place])) for place in places):
            sizes = tuple(old[p] for p in places), tuple(new[p] for p in places)
            operand = tuple(
                _OPEN if given.intersection(atoms(dim)) else evaluate(dim, lambda a: counts.get(a, a.size))
                for dim in groups.axes.dims(node.all_input_nodes[0])
            )
            found[Fit(module_path(node), len(dims), places, *sizes, operand)] = None
    return tuple(found)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")).partition(".")[0]


def _inputs(groups: Groups) -> Iterator[fx.Node]:
    for node in groups.program.nodes:
        if node.op == "placeholder" and groups.program.param(node) is None:
            yield node


def _sized(groups: Groups, node: fx.Node) -> Iterator[Dim]:
    """The dims whose sizes a view or a split is told."""
    name = _name(node)
    if name in ("view", "reshape", "_unsafe_view"):
        yield from groups.axes.dims(node)
    elif name == "unflatten":
        source, along, sizes = node.args[:3]
        assert isinstance(source, fx.Node)
        assert isinstance(along, int)
        assert isinstance(sizes, Sequence)
        first = along % len(groups.axes.dims(source))
        yield from groups.axes.dims(node)[first : first + len(sizes)]
    elif name in ("split_with_sizes", "split", "chunk"):
        along = node.args[2] if len(node.args) > 2 else 0
        assert isinstance(along, int)
        yield from (dims[along] for dims in groups.axes.of_node[node.name])


def install_fits(model: nn.Module, fits: Iterable[Fit]) -> None:
    """Let the forward of each module live by its fits, beside those that it has already."""
    by_module: dict[str, list[Fit]] = {}
    for fit in fits:
        by_module.setdefault(fit.module, []).append(fit)
    for path, own in by_module.items():
        module = model.get_submodule(path)
        inner: Any = module.forward
        known: tuple[Fit, ...] = ()
        if isinstance(inner, _FittedForward):
            inner, known = inner.__wrapped__, inner.mode.fits
        module.forward = _FittedForward(inner, _Fitting((*known, *own)))


def watch_fits(model: nn.Module) -> nn.Module:
    """``model``, whose modules note from now on which fits they need."""
    for mode in _modes(model).values():
        mode.used = set()
    return model


def needed(model: nn.Module, fits: tuple[Fit, ...]) -> tuple[Fit, ...]:
    """Those of ``fits`` that a module of the same class needed in the watched ``model``; all where it noted none."""
    forms = {(type(module), fit.rank, fit.places) for module, mode in _modes(model).items() for fit in mode.used or ()}
    found = tuple(f for f in fits if (type(model.get_submodule(f.module)), f.rank, f.places) in forms)
    return found or fits


def _modes(model: nn.Module) -> dict[nn.Module, _Fitting]:
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    return {module: own.mode for module, own in forwards.items() if isinstance(own, _FittedForward)}


class _FittedForward:
    """A module's forward with its fits; a class, so that models with it can be copied."""

    def __init__(self, forward: Callable[..., Any], mode: _Fitting) -> None:
        self.__wrapped__ = forward  # by which inspect finds the signature
        self.mode = mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return self.__wrapped__(*args, **kwargs)


class _Fitting(TorchFunctionMode):
    """Gives views and splits that cannot be had the sizes that the plan left."""

    def __init__(self, fits: tuple[Fit, ...]) -> None:
        super().__init__()
        self.fits = fits
        self.used: set[Fit] | None = None  # noted where the model is watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS and not kwargs:
            whole = args[0].numel()
            asked = args[1] if isinstance(args[1], Sequence) else args[1:]
            if _are_sizes(asked):
                return func(args[0], self._fitting(tuple(asked), whole, math.prod))
            if _are_sizes(asked, left_open=1):
                return func(args[0], self._fitting_open(tuple(asked), args[0].shape, whole))
        elif func in _UNFLATTENS and len(args) == 3 and not kwargs:
            x, along, asked = args
            if _are_sizes(asked):
                return func(x, along, self._fitting(tuple(asked), x.shape[along], math.prod))
            if _are_sizes(asked, left_open=1):
                return func(x, along, self._fitting_open(tuple(asked), x.shape, x.shape[along]))
        elif func in _SPLITS and len(args) > 1 and _are_sizes(args[1]):
            along = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            return func(args[0], list(self._fitting(tuple(args[1]), args[0].shape[along], sum)), *args[2:], **kwargs)
        elif func in (*_SPLITS, *_CHUNKS) and len(args) > 1 and isinstance(args[1], int):
            along = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            parts = self._parts(args[0], args[1], along, func in _CHUNKS)
            if parts is not None:
                return torch.split(args[0], list(parts), along)
        return func(*args, **kwargs)

    def _fitting_open(self, asked: Shape, shape: Sequence[int], whole: int) -> Shape:
        """``asked``, of which one is open and takes any rest: what a cut made of it, where the operand is one of it."""
        return self._only(
            [(s, by) for s, by in self._known(asked) if by and by[-1].reads(shape) and whole % -math.prod(s) == 0],
            asked,
        )

    def _parts(self, x: Tensor, number: int, along: int, count: bool) -> Shape | None:
        """The sizes that are meant by one size, or by the ``count`` of parts, of what was cut; None for all else."""
        answers: list[tuple[Shape, tuple[Fit, ...]]] = []
        for fit in self.fits:
            said = len(fit.places) if count else fit.old[0]
            if len(fit.places) == fit.rank and said == number:
                chains = [(s, by) for s, by in self._known(fit.old) if by and by[-1].reads(x.shape)]
                answers += [(s, by) for s, by in chains if sum(s) == x.shape[along] and (s, by) not in answers]
        return self._only(answers, ()) or None

    def _fitting(self, asked: Shape, whole: int, measure: Callable[[Shape], int]) -> Shape:
        """``asked`` where it can be had, else what one or more cuts made of it; ``asked`` too where two answers fit."""
        if measure(asked) == whole:
            return asked
        return self._only([(sizes, by) for sizes, by in self._known(asked) if measure(sizes) == whole], asked)

    def _known(self, asked: Shape) -> list[tuple[Shape, tuple[Fit, ...]]]:
        """``asked`` and what one or more cuts made of it, each with these."""
        known: list[tuple[Shape, tuple[Fit, ...]]] = [(asked, ())]  # symbolic sizes have no hash
        for sizes, by in known:
            for fit in self.fits:
                made = fit.of(sizes)
                if (
                    made is not None
                    and all(made != other or by_[-1:] != (fit,) for other, by_ in known[1:])
                    and made != asked
                ):
                    known.append((made, (*by, fit)))
        return known

    def _only(self, answers: Sequence[tuple[Shape, tuple[Fit, ...]]], asked: Shape) -> Shape:
        """The only answer, which is noted; ``asked`` where there is none or more than one."""
        if any(sizes != answers[0][0] for sizes, _ in answers) or not answers:
            return asked
        found, needed_fits = answers[0]
        if self.used is not None:
            self.used.update(needed_fits)
        return found


def _are_sizes(asked: Any, left_open: int = 0) -> bool:
    """Whether every size is given, but for as many that are left open (-1)."""
    if not isinstance(asked, Sequence) or not all(isinstance(s, int | torch.SymInt) for s in asked):
        return False
    return sum(bool(s < 0) for s in asked) == left_open
