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
from shear_ir.program import module_path
from shear_passes.analysis.find_groups import Groups

Sizes = tuple[int, ...]

_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
_SPLITS = (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)


@dataclass(frozen=True)
class Fit:
    """In ``module``, ``rank`` sizes of which those at ``places`` are ``old`` and do not fit are meant as ``new``."""

    module: str
    rank: int
    places: Sizes
    old: Sizes
    new: Sizes

    def of(self, sizes: Sizes) -> Sizes | None:
        """``sizes`` with the new ones; None where they are not those of the dense model."""
        if len(sizes) != self.rank or tuple(sizes[place] for place in self.places) != self.old:
            return None
        changed = dict(zip(self.places, self.new, strict=True))
        return tuple(changed.get(place, size) for place, size in enumerate(sizes))


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
        # A size with batch or length in it is another one at the next input.
        if places and not any(given.intersection(atoms(dims[place])) for place in places):
            sizes = tuple(old[p] for p in places), tuple(new[p] for p in places)
            found[Fit(module_path(node), len(dims), places, *sizes)] = None
    return tuple(found)


def _inputs(groups: Groups) -> Iterator[fx.Node]:
    for node in groups.program.nodes:
        if node.op == "placeholder" and groups.program.param(node) is None:
            yield node


def _sized(groups: Groups, node: fx.Node) -> Iterator[Dim]:
    """The dims whose sizes a view or a split is told."""
    name = getattr(node.target, "__name__", "").partition(".")[0]
    if name in ("view", "reshape", "_unsafe_view"):
        yield from groups.axes.dims(node)
    elif name == "split_with_sizes":
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
        elif func in _SPLITS and len(args) > 1 and _are_sizes(args[1]):
            along = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            return func(args[0], list(self._fitting(tuple(args[1]), args[0].shape[along], sum)), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _fitting(self, asked: Sizes, whole: int, measure: Callable[[Sizes], int]) -> Sizes:
        """``asked`` where it can be had, else what one or more cuts made of it; ``asked`` too where two answers fit."""
        if measure(asked) == whole:
            return asked
        known: list[tuple[Sizes, tuple[Fit, ...]]] = [(asked, ())]  # symbolic sizes have no hash
        for sizes, by in known:
            for fit in self.fits:
                made = fit.of(sizes)
                if made is not None and all(made != other for other, _ in known):
                    known.append((made, (*by, fit)))
        answers = [(sizes, by) for sizes, by in known if measure(sizes) == whole]
        if len(answers) != 1:
            return asked
        ((found, needed_fits),) = answers
        if self.used is not None:
            self.used.update(needed_fits)
        return found


def _are_sizes(asked: Any) -> bool:
    """Whether every size is given: one left open (-1) takes any rest, also of the wrong widths at some lengths."""
    return isinstance(asked, Sequence) and all(isinstance(s, int | torch.SymInt) and s >= 0 for s in asked)
