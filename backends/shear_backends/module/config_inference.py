"""Which config builds the sheared model, found by finite differences: no table says what a field means.

A field is a candidate when its value is the old size of a dim that changed. The class is built on the meta device
from candidate configs until every tensor has the sheared shape; where none fits, the result is not stock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shear_backends.module.attributes import spans
from shear_backends.module.config_builds import Shapes, shapes_of
from shear_backends.module.config_fields import Changes, FieldPath, changed, fields_of, objection, set_field
from shear_backends.module.config_search import Search, changed_shapes
from shear_backends.module.rms_norms import rms_norms_of
from shear_ir.axes import Axis, Mask, evaluate
from shear_ir.frontend.base import base_view, has_adapters, plain_base
from shear_ir.plans import Kept
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.rescale_norm import NormFix

_FEW = 2


@dataclass(frozen=True)
class ConfigInference:
    """``config``: builds exactly the sheared shapes; None when none does. ``changes``: the fields that differ.

    ``refused``: what stands in the way of ``changes``: the config class's own objection, or a tensor that it computes.
    ``others``: configs of the same shapes, for when ``config`` does not build the same function: the fewest changes
    come first, but a number that no shape tells may have to follow, such as the heads of a width that they share out.
    """

    config: Any | None
    changes: Mapping[FieldPath, int]
    refused: str = ""
    others: Callable[[], Iterator[Any]] = lambda: iter(())


def infer_config(
    model: nn.Module, groups: Groups, masks: Mapping[Axis, Mask], kept: Kept, norms: tuple[NormFix, ...] = (),
    like: Mapping[FieldPath, int] | None = None, *, searching: bool = True,
) -> ConfigInference:  # fmt: skip
    """The config whose model has exactly the sheared shapes, if the class has one; with adapters, their base's.

    ``like``: the changes that told other sizes of the same model, tried before a search, or alone without one.
    """
    if has_adapters(model):
        model, kept, norms = _base_alone(model, kept, norms)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return ConfigInference(None, {})
    if rms_norms_of(model) is not None:
        return ConfigInference(None, {}, "its layer norms have become RMS norms, which no config of its class builds")
    search, changes = _changes(model, _target(model, kept), new_sizes(groups, masks), like or {}, searching)
    if changes is None:
        return ConfigInference(None, {})
    found = changed(config, changes)
    refused = objection(found) or _computed(model, kept)
    if refused:
        return ConfigInference(None, changes, refused)
    if norms and not _scale_eps(model, found, norms):
        return ConfigInference(
            None, changes, "norms that become narrower share their eps with others, or have eps of their own"
        )

    def others() -> Iterator[Any]:
        for more in search.also(changes):
            other = changed(config, more)
            if not objection(other) and (not norms or _scale_eps(model, other, norms)):
                yield other

    return ConfigInference(found, changes, others=others)


def _computed(model: nn.Module, kept: Kept) -> str:
    """What is cut although the class computes it from its config and saves it nowhere; empty where nothing is."""
    saved = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if kept.get(name) and name not in saved and not _constant(buffer):
            return f"{name} is computed from the config, which has no field for what is left of it"
    return ""


def _constant(buffer: Tensor) -> bool:
    return not buffer.is_meta and bool((buffer == buffer.flatten()[:1]).all())


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


def _changes(
    model: nn.Module, target: Shapes, sizes: Mapping[int, set[int]], like: Mapping[FieldPath, int], searching: bool
) -> tuple[Search, Changes | None]:
    """The fields to change, searched for in a model of few layers where the whole model confirms what is found."""
    depth = few_layers(model)
    if depth:
        short = Search(model, target, sizes, depth)
        few = short.guess(like) or (short.run() if searching else None)
        by_place = any(isinstance(path[-1], int) for path in short.fields)
        if (few is None and not by_place) or (few is not None and changed_shapes(model, few) == target):
            return short, few
    whole = Search(model, target, sizes)
    if whole.base is None or set(whole.base) != set(target):
        return whole, None
    return whole, whole.guess(like) or (whole.run() if searching else None)


def few_layers(model: nn.Module) -> Changes:
    """Values of the fields that say how often layers are repeated, for a model that is the same but for its length."""
    base = shapes_of(model)
    lengths = {len(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    fewer: Changes = {}
    for path, value in fields_of(model.config):
        if isinstance(value, int) and value > _FEW and value in lengths:
            shapes = changed_shapes(model, {**fewer, path: _FEW})
            if shapes is not None and len(shapes) < len(base) and shapes.items() <= base.items():
                fewer[path] = _FEW
    return fewer


def _target(model: nn.Module, kept: Kept) -> Shapes:
    """The shapes the sheared model's tensors must have, those of tied tensors under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    dims_of = {id(tensor): kept[name] for name, tensor in named if name in kept}
    shapes = shapes_of(model)
    for name, tensor in named:
        shape = list(tensor.shape)
        for dim, indices in dims_of.get(id(tensor), {}).items():
            shape[dim] = len(indices)
        shapes[name] = tuple(shape)
    return shapes


def new_sizes(groups: Groups, masks: Mapping[Axis, Mask]) -> dict[int, set[int]]:
    """Old size to new sizes, over every dim of every value and parameter and runs of their factors."""
    counts = {atom: int(stays.sum()) for atom, stays in masks.items()}
    found: dict[int, set[int]] = {}

    axes = groups.axes
    everywhere = (*axes.of_param.values(), *(d for results in axes.of_node.values() for d in results))
    for dim in {id(dim): dim for dims in everywhere for dim in dims}.values():
        for _, part in spans(dim):
            found.setdefault(part.size, set()).add(evaluate(part, lambda a: counts.get(a, a.size)))
    return found


def _scale_eps(model: nn.Module, config: Any, norms: tuple[NormFix, ...]) -> bool:
    """Scale the eps of ``config`` as the norms ask; False where that would change modules that are no such norms."""
    scaled = {fix.module for fix in norms}
    factors = {(fix.eps, fix.factor) for fix in norms}
    if len(factors) != 1:
        return False
    eps, factor = factors.pop()
    if eps is None:
        return True

    def holds() -> bool:
        with torch.device("meta"):
            fresh = dict(type(model)(copy.deepcopy(config)).named_modules())
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, float) and value == eps:
                    wanted = value * factor if path in scaled else value
                    if path not in fresh or getattr(fresh[path], name, None) != wanted:
                        return False
        return True

    equal = [path for path, value in fields_of(config, of=(float,)) if value == eps]
    for path in equal:
        set_field(config, path, eps * factor)
    if not holds():
        return False
    # Other numbers may be as small as eps.
    for path in equal if len(equal) > 1 else ():
        set_field(config, path, eps)
        if not holds():
            set_field(config, path, eps * factor)
    return True
