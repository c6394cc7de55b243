"""Which config builds the sheared model, found by finite differences: no table says what a field means.

A field is a candidate when its value is the old size of a dim that changed. The class is built on the meta device
from candidate configs until every tensor has the sheared shape; where none fits, the result is not stock.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shear_ir.axes import Axis, Dim, Mask, Product, evaluate, resolve
from shear_ir.plans import Kept
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.rescale_norm import NormFix

Field = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]

_BUILDS = 96


@dataclass(frozen=True)
class Inference:
    """``config``: builds exactly the sheared shapes; None when none does. ``changes``: the fields that differ.

    ``refused``: the config class's own objection, when only that stands in the way of ``changes``.
    """

    config: Any | None
    changes: Mapping[Field, int]
    refused: str = ""


def infer_config(
    model: nn.Module, groups: Groups, masks: Mapping[Axis, Mask], kept: Kept, norms: tuple[NormFix, ...] = ()
) -> Inference:
    """The config whose model has exactly the sheared shapes, if the class has one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or hasattr(model, "peft_config"):
        return Inference(None, {})
    search = _Search(model, _target(model, kept), _sizes(groups, masks))
    changes = search.run()
    if changes is None:
        return Inference(None, {})
    found = search.config(changes)
    refused = _objection(found)
    if refused:
        return Inference(None, changes, refused)
    if norms:
        _scale_eps(found, norms)
    return Inference(found, changes)


def accepted_counts(model: nn.Module, changes: Mapping[Field, int], size: int, count: int) -> list[int]:
    """Which counts from 1 to ``size`` the config class accepts in place of ``count``, all other changes alike."""
    accepted = []
    for other in range(1, size + 1):
        config = copy.deepcopy(model.config)
        for path, value in changes.items():
            old = _get(config, path)
            follows = isinstance(old, int) and old % size == 0 and value == old // size * count
            _set(config, path, old // size * other if follows else value)
        if not _objection(config):
            accepted.append(other)
    return accepted


def _objection(config: Any) -> str:
    """What the config class itself has against the values of ``config``; empty when nothing."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as failure:  # every config class objects in its own way
        return str(failure.__cause__ or failure).splitlines()[0]
    return ""


def _get(config: Any, path: Field) -> Any:
    for part in path:
        config = getattr(config, part, None)
    return config


def _set(config: Any, path: Field, value: Any) -> None:
    for part in path[:-1]:
        config = getattr(config, part)
    setattr(config, path[-1], value)


def _target(model: nn.Module, kept: Kept) -> Shapes:
    """The shapes the sheared model's tensors must have."""
    shapes = _shapes(model)
    for name, dims in kept.items():
        if name in shapes:
            shape = list(shapes[name])
            for dim, indices in dims.items():
                shape[dim] = len(indices)
            shapes[name] = tuple(shape)
    return shapes


def _shapes(model: nn.Module) -> Shapes:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def _sizes(groups: Groups, masks: Mapping[Axis, Mask]) -> dict[int, set[int]]:
    """Old size to new sizes, over every dim of every value and parameter and their factors."""
    counts = {atom: int(stays.sum()) for atom, stays in masks.items()}
    found: dict[int, set[int]] = {}

    def note(dim: Dim) -> None:
        solved = resolve(dim)
        parts = (solved, *solved.factors) if isinstance(solved, Product) else (solved,)
        for part in parts:
            found.setdefault(part.size, set()).add(evaluate(part, lambda a: counts.get(a, a.size)))

    axes = groups.axes
    for dims in (*axes.of_param.values(), *(d for results in axes.of_node.values() for d in results)):
        for dim in dims:
            note(dim)
    return found


class _Search:
    def __init__(self, model: nn.Module, target: Shapes, sizes: Mapping[int, set[int]]) -> None:
        self.model = model
        self.target = target
        self.sizes = sizes
        self.builds = 0
        self.base = _shapes(model)
        self.moving = {n for n in target if target[n] != self.base.get(n)}

    def run(self) -> Mapping[Field, int] | None:
        """The fields to change; None when no change of fields gives the shapes."""
        fields = dict(_fields(self.model.config))
        sizes = {f: v for f, v in fields.items() if isinstance(v, int)}
        options = {f: sorted(self.sizes.get(v, set()) - {v}) for f, v in sizes.items()}
        options = {f: new for f, new in options.items() if new}
        first = {f: new[0] for f, new in options.items()}
        for changes in self._orders(options, first):
            if self._fits(changes):
                return changes
        return self._with_silent_fields(fields, options)

    def _orders(self, options: dict[Field, list[int]], first: dict[Field, int]) -> Iterator[dict[Field, int]]:
        yield first
        useful = {f: new for f, new in options.items() if self._harmless({f: new[0]})}
        choices = [[*new, None] for new in useful.values()]
        for picks in sorted(itertools.product(*choices), key=lambda p: p.count(None)):
            yield {f: pick for f, pick in zip(useful, picks, strict=True) if pick is not None}

    def _with_silent_fields(
        self, fields: dict[Field, Any], options: dict[Field, list[int]]
    ) -> Mapping[Field, int] | None:
        """Fields that were not set (``head_dim=None``, ``n_inner=None``) and that the constructor asked for."""
        silent = [f for f, v in fields.items() if v is None]
        silent += [(name,) for name in self._asked_for() if (name,) not in fields]
        base = {f: new[0] for f, new in options.items()}
        seen = sorted({new for news in self.sizes.values() for new in news} | set(self.sizes))
        for name in silent:
            if self._moves({name: 7}):
                for changes in (base, {}, *({f: base[f]} for f in base)):
                    for value in seen:
                        if self._fits({**changes, name: value}):
                            return {**changes, name: value}
        return None

    def _asked_for(self) -> list[str]:
        """Names the constructor looks up in the config although the config does not have them."""
        missed: list[str] = []
        config = copy.deepcopy(self.model.config)
        kind = type(config)

        def note(_: Any, name: str) -> Any:
            missed.append(name)
            raise AttributeError(name)

        config.__class__ = type(kind.__name__, (kind,), {"__getattr__": note})
        try:
            with torch.device("meta"):
                type(self.model)(config)
        except Exception:  # a class may look at its config's type: then nothing is learned
            return []
        return [n for n in dict.fromkeys(missed) if not n.startswith("_")]

    def _harmless(self, changes: Mapping[Field, int]) -> bool:
        """Whether a change moves only tensors that have to move; a build that fails says nothing against it."""
        shapes = self._build(changes)
        if shapes is None:
            return True
        return shapes.keys() == self.base.keys() and all(shapes[n] == self.base[n] or n in self.moving for n in shapes)

    def _moves(self, changes: Mapping[Field, int]) -> bool:
        shapes = self._build(changes)
        return shapes is not None and shapes != self.base

    def _fits(self, changes: Mapping[Field, int]) -> bool:
        return self._build(changes) == self.target

    def _build(self, changes: Mapping[Field, int]) -> Shapes | None:
        if self.builds >= _BUILDS:
            return None
        self.builds += 1
        try:
            config = self.config(changes)
            with torch.device("meta"):
                return _shapes(type(self.model)(config))
        except Exception:  # any constructor may refuse any config: then it is not this one
            return None

    def config(self, changes: Mapping[Field, int]) -> Any:
        """The model's config with the given fields changed."""
        config = copy.deepcopy(self.model.config)
        for path, value in changes.items():
            _set(config, path, value)
        return config


def _fields(config: Any, prefix: Field = ()) -> Iterable[tuple[Field, Any]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from _fields(value, (*prefix, name))
        elif value is None or (isinstance(value, int) and not isinstance(value, bool)):
            yield (*prefix, name), value


def _scale_eps(config: Any, norms: tuple[NormFix, ...]) -> None:
    eps = {fix.eps for fix in norms}
    factors = {fix.factor for fix in norms}
    if len(factors) != 1:
        return
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and value in eps:
            setattr(config, name, value * factors.pop())
            return
