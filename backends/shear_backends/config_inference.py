"""Which config builds the sheared model, found by finite differences: no table says what a field means.

A field is a candidate when its value is the old size of a dim that changed. The class is built on the meta device
from candidate configs until every tensor has the sheared shape; where none fits, the result is not stock.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shear_backends.attributes import spans
from shear_backends.config_builds import Shapes, asked_for, built_shapes, shapes_of
from shear_ir.axes import Axis, Mask, evaluate
from shear_ir.frontend.base import base_view, has_adapters, plain_base
from shear_ir.plans import Kept
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.rescale_norm import NormFix

Field = tuple[str | int, ...]
"""The way to a config field: attribute names, and places in lists."""
Changes = dict[Field, int]

_BUILDS = 96
_FEW = 2


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
    """The config whose model has exactly the sheared shapes, if the class has one; with adapters, their base's."""
    if has_adapters(model):
        model, kept, norms = _base_alone(model, kept, norms)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return Inference(None, {})
    changes = _changes(model, _target(model, kept), _sizes(groups, masks))
    if changes is None:
        return Inference(None, {})
    found = _changed(config, changes)
    refused = _objection(found)
    if refused:
        return Inference(None, changes, refused)
    if norms and not _scale_eps(model, found, norms):
        return Inference(None, changes)
    return Inference(found, changes)


def _base_alone(
    model: nn.Module, kept: Kept, norms: tuple[NormFix, ...]
) -> tuple[nn.Module, Kept, tuple[NormFix, ...]]:
    """The base of a PEFT model and what happens to it, by its own names."""
    view = base_view(model)
    tensors = {name: base for base, (name, *_) in view.tensors.items()}
    modules = {path: base for base, (path, *_) in view.modules.items()}
    mine = {tensors.get(name, name): dims for name, dims in kept.items() if name in tensors or name in view.tensors}
    fixes = [
        replace(fix, module=modules.get(fix.module, fix.module), parameter=tensors.get(fix.parameter, fix.parameter))
        for fix in norms
    ]
    return plain_base(model), mine, tuple(fixes)


def _changes(model: nn.Module, target: Shapes, sizes: Mapping[int, set[int]]) -> Changes | None:
    """The fields to change, searched for in a model of few layers where the whole model confirms what is found."""
    depth = _few_layers(model, shapes_of(model))
    if depth:
        few = _Search(model, target, sizes, depth).run()
        if few is not None and _changed_shapes(model, few) == target:
            return few
    whole = _Search(model, target, sizes)
    return None if whole.base is None or set(whole.base) != set(target) else whole.run()


def _few_layers(model: nn.Module, base: Shapes) -> Changes:
    """Values of the fields that say how often layers are repeated, for a model that is the same but for its length."""
    lengths = {len(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    fewer: Changes = {}
    for path, value in _fields(model.config):
        if isinstance(value, int) and value > _FEW and value in lengths:
            shapes = _changed_shapes(model, {**fewer, path: _FEW})
            if shapes is not None and len(shapes) < len(base) and shapes.items() <= base.items():
                fewer[path] = _FEW
    return fewer


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
        config = config[part] if isinstance(part, int) else getattr(config, part, None)
    return config


def _set(config: Any, path: Field, value: Any) -> None:
    *parents, last = path
    owner = _get(config, tuple(parents))
    if isinstance(last, int):
        owner[last] = value
    else:
        setattr(owner, last, value)


def _target(model: nn.Module, kept: Kept) -> Shapes:
    """The shapes the sheared model's tensors must have."""
    shapes = shapes_of(model)
    for name, dims in kept.items():
        if name in shapes:
            shape = list(shapes[name])
            for dim, indices in dims.items():
                shape[dim] = len(indices)
            shapes[name] = tuple(shape)
    return shapes


def _changed_shapes(model: nn.Module, changes: Changes) -> Shapes | None:
    """The shapes of a model of this class with the given fields changed; None when the class refuses them."""
    try:
        config = _changed(model.config, changes)
    except Exception:  # a config class may refuse a field before any constructor does
        return None
    return built_shapes(type(model), config)


def _changed(config: Any, changes: Changes) -> Any:
    """A copy of the config with the given fields changed."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        _set(config, path, value)
    return config


def _sizes(groups: Groups, masks: Mapping[Axis, Mask]) -> dict[int, set[int]]:
    """Old size to new sizes, over every dim of every value and parameter and runs of their factors."""
    counts = {atom: int(stays.sum()) for atom, stays in masks.items()}
    found: dict[int, set[int]] = {}

    axes = groups.axes
    everywhere = (*axes.of_param.values(), *(d for results in axes.of_node.values() for d in results))
    for dim in {id(dim): dim for dims in everywhere for dim in dims}.values():
        for _, part in spans(dim):
            found.setdefault(part.size, set()).add(evaluate(part, lambda a: counts.get(a, a.size)))
    return found


class _Search:
    """Descends from the config in which every field follows its dim to the one that gives the target shapes."""

    def __init__(
        self, model: nn.Module, target: Shapes, sizes: Mapping[int, set[int]], depth: Changes | None = None
    ) -> None:
        self.model = model
        self.sizes = sizes
        self.depth = depth or {}
        self.builds: dict[frozenset[tuple[Field, int]], Shapes | None] = {}
        self.base = self._build({})
        self.target = {n: s for n, s in target.items() if n in (self.base or ())} if depth else target

    def fits(self, changes: Changes) -> bool:
        """Whether the changes give exactly the target shapes."""
        return self._distance(changes) == 0.0

    def run(self) -> Changes | None:
        """The fields to change; None when no change of fields gives the shapes."""
        fields = dict(_fields(self.model.config))
        pins = self._pins(fields)
        options: dict[Field, list[int]] = {}
        for path, value in {**fields, **pins}.items():
            news = sorted(n for n in self.sizes.get(value, ()) if n != value) if isinstance(value, int) else []
            news = [n for n in news if self._helps({**pins, path: n})]
            if news:
                options[path] = news
        changes = self._descend({**pins, **{path: news[0] for path, news in options.items()}}, options, pins)
        if not self.fits(changes):
            return None
        for path in pins:
            without = {p: v for p, v in changes.items() if p != path}
            if self.fits(without):
                changes = without
        return changes

    def _descend(self, changes: Changes, options: Mapping[Field, list[int]], pins: Changes) -> Changes:
        """One field at a time to the value nearest to the target, until none helps; its old value is one of them."""
        best = self._distance(changes)
        better = True
        while better and best > 0.0:
            better = False
            for path, news in options.items():
                kept = {p: v for p, v in changes.items() if p != path or path in pins}
                tries = [{**kept, path: pins[path]} if path in pins else kept]
                tries += [{**kept, path: new} for new in news if new != changes.get(path)]
                found, nearest = min(((self._distance(t), i) for i, t in enumerate(tries)), default=(best, 0))
                if found < best:
                    changes, best, better = tries[nearest], found, True
        return changes

    def _pins(self, fields: Mapping[Field, Any]) -> Changes:
        """Fields that were not set (``head_dim=None``, ``n_inner=None``) or that the constructor only asked for.

        Each at the value that changes nothing, so that a field it was derived from can change without it.
        """
        silent = [path for path, value in fields.items() if value is None]
        missed = asked_for(type(self.model), _changed(self.model.config, self.depth))
        silent += [(name,) for name in missed if (name,) not in fields]
        probe = 1 + max(self.sizes, default=0)
        pins: Changes = {}
        for path in silent:
            probed = self._build({path: probe})
            if probed is None or probed == self.base:
                continue
            likely = {old * probe // new for old, new in self._moved(probed) if old * probe % new == 0}
            for value in (*sorted(likely), *sorted(set(self.sizes) - likely)):
                if self._build({path: value}) == self.base:
                    pins[path] = value
                    break
        return pins

    def _helps(self, changes: Changes) -> bool:
        """Whether a change moves dims, and only such as have to move; a build that fails says nothing against it."""
        shapes = self._build(changes)
        if shapes is None:
            return True
        assert self.base is not None
        if set(shapes) != set(self.base) or any(len(shapes[n]) != len(self.base[n]) for n in shapes):
            return False
        moved = [(n, d) for n, shape in shapes.items() for d, s in enumerate(shape) if s != self.base[n][d]]
        return bool(moved) and all(self.target[n][d] != self.base[n][d] for n, d in moved)

    def _moved(self, shapes: Shapes) -> Iterator[tuple[int, int]]:
        """Old and new size of every dim that differs from the base."""
        assert self.base is not None
        for name, shape in shapes.items():
            for old, new in zip(self.base.get(name, ()), shape, strict=False):
                if old != new:
                    yield old, new

    def _distance(self, changes: Changes) -> float:
        """How far the built shapes are from the target; 0 only for the target itself.

        Logarithms, so that a dim that two fields make together (heads x head_dim) comes nearer by either of them.
        """
        shapes = self._build(changes)
        if shapes is None or {n: len(s) for n, s in shapes.items()} != {n: len(s) for n, s in self.target.items()}:
            return math.inf
        pairs = (p for n, shape in shapes.items() for p in zip(shape, self.target[n], strict=True))
        return sum(abs(math.log(a / b)) if a and b else 1.0 for a, b in pairs if a != b)

    def _build(self, changes: Changes) -> Shapes | None:
        """The shapes of a model built with ``changes``; None when the class refuses them."""
        key = frozenset(changes.items())
        if key not in self.builds and len(self.builds) < _BUILDS:
            self.builds[key] = _changed_shapes(self.model, {**changes, **self.depth})
        return self.builds.get(key)


def _fields(config: Any, prefix: Field = (), of: tuple[type, ...] = (int, type(None))) -> Iterator[tuple[Field, Any]]:
    """The integer and unset fields of a config, of its sub-configs and of its lists (``ffn_dims=[64, 48]``)."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from _fields(value, (*prefix, name), of)
        elif isinstance(value, list):
            yield from (((*prefix, name, place), entry) for place, entry in enumerate(value) if type(entry) is int)
        elif type(value) in of:
            yield (*prefix, name), value


def _scale_eps(model: nn.Module, config: Any, norms: tuple[NormFix, ...]) -> bool:
    """Scale the eps of ``config`` as the norms ask; False where that would change modules that are no such norms."""
    scaled = {fix.module: fix for fix in norms}
    factors = {(fix.eps, fix.factor) for fix in norms}
    if len(factors) != 1:
        return False
    eps, factor = factors.pop()
    for path, value in _fields(config, of=(float,)):
        if value == eps:
            _set(config, path, value * factor)
    with torch.device("meta"):
        fresh = dict(type(model)(copy.deepcopy(config)).named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and value == eps:
                wanted = value * factor if path in scaled else value
                if path not in fresh or getattr(fresh[path], name, None) != wanted:
                    return False
    return True
