"""The Python attributes of modules that must follow the axes: ``num_heads``, ``out_features``, ``split_size``.

No table says which they are. An attribute can follow a dim when it had that dim's old size in every module of its
class. Where that leaves a choice, the constructor is asked which parameter dim the attribute makes (finite
differences on the meta device); what is still open is tried, and the graph backend judges.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from shear_backends.verify.numbers import evaluation, run
from shear_ir.axes import Axis, Dim, Mask, Product, evaluate, product, resolve
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.unchanged import copied
from shear_ir.nodes import module_path
from shear_ir.paths import parent, split
from shear_passes.analysis.find_groups import Groups

AttributeSite = tuple[Any, ...]
SizesBySite = dict[AttributeSite, tuple[int, int]]
Overrides = dict[str, dict[str, Any]]
"""Module path to attribute (``num_heads``, ``config.num_attention_heads``) to its new value."""

_TRIES = 256


@dataclass
class _Choice:
    """One attribute of one class: the vectors of values its modules could get, likeliest first."""

    paths: list[str]
    attribute: str
    options: list[list[Any]]


def candidates(model: nn.Module, groups: Groups, masks: Mapping[Axis, Mask], feed: Inputs) -> Iterator[Overrides]:
    """Assignments of new values to attributes, likeliest first; at most 256 of them."""
    sites = _Sites(model, groups, masks)
    choices = [choice for choice in _choices(model, sites, _config_reads(model, feed)) if choice.options]
    fixed = [c for c in choices if len(c.options) == 1]
    open_ = [c for c in choices if len(c.options) > 1]
    ranks = sorted(itertools.islice(itertools.product(*(range(len(c.options)) for c in open_)), 65536), key=sum)
    for picks in ranks[:_TRIES]:
        overrides: Overrides = {}
        for choice, pick in [*((c, 0) for c in fixed), *zip(open_, picks, strict=True)]:
            for path, value in zip(choice.paths, choice.options[pick], strict=True):
                overrides.setdefault(path, {})[choice.attribute] = value
        yield overrides


def optional(model: nn.Module, overrides: Overrides) -> list[tuple[list[str], str]]:
    """The attributes among ``overrides`` that no constructor made of a size, with the modules of a class that have it.

    Such an attribute was taken for a size because it had its value, as a window of positions may.
    """
    by_class: dict[type, list[str]] = {}
    for path in overrides:
        by_class.setdefault(type(model.get_submodule(path)), []).append(path)
    found: list[tuple[list[str], str]] = []
    for paths in by_class.values():
        made = _constructor_dims(model.get_submodule(paths[0]))
        names = dict.fromkeys(name for path in paths for name in overrides[path])
        found += [(paths, name) for name in names if name not in made]
    return found


def without(overrides: Overrides, paths: Sequence[str], name: str) -> Overrides:
    """``overrides`` but for one attribute of some modules."""
    left = {p: {n: v for n, v in own.items() if p not in paths or n != name} for p, own in overrides.items()}
    return {path: own for path, own in left.items() if own}


def apply_attributes(model: nn.Module, overrides: Overrides) -> None:
    """Set the attributes on the modules of ``model``."""
    for path, values in overrides.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            owner, leaf = split(name)
            if owner:
                # The config is every module's: one that lives by other values gets a copy of its own.
                setattr(module, owner, copy.copy(getattr(module, owner)))
            target = getattr(module, owner) if owner else module
            setattr(target, leaf, tuple(value) if isinstance(getattr(target, leaf, None), tuple) else value)


def spans(dim: Dim) -> Iterator[tuple[tuple[int, ...], Dim]]:
    """``dim``, its factors and the runs of them (of ``ranks x heads x head_dim``: all heads), each with its place."""
    solved = resolve(dim)
    yield (), solved
    if isinstance(solved, Product):
        count = len(solved.factors)
        for length in range(1, count):
            for first in range(count - length + 1):
                yield (first, first + length), product(solved.factors[first : first + length])


class _Sites:
    """Every dim a module sees, as a place that is the same in all modules of a class, with its old and new size."""

    def __init__(self, model: nn.Module, groups: Groups, masks: Mapping[Axis, Mask]) -> None:
        self.groups = groups
        counts = {atom: int(stays.sum()) for atom, stays in masks.items()}
        self.counts = counts
        self.own: dict[str, SizesBySite] = {}
        self.inner: dict[str, SizesBySite] = {}
        self.below: dict[str, SizesBySite] = {}
        for name, dims in groups.axes.of_param.items():
            path, leaf = split(name)
            self._put(self.own, path, ("own", leaf), dims)
            made = _parametrized(model, name)
            if made is not None:
                self._put(self.own, made[0], ("own", made[1]), dims)
            above, child = split(path)
            self._put(self.below, above, ("below", child, leaf), dims)
        ordinals: dict[str, int] = {}
        for node in groups.program.calls():
            path = module_path(node)
            place = ordinals[path] = ordinals.get(path, -1) + 1
            for number, dims in enumerate(groups.axes.of_node.get(node.name, [])):
                self._put(self.inner, path, ("out", place, number), dims)
            for number, source in enumerate(node.all_input_nodes):
                self._put(self.inner, path, ("in", place, number), groups.axes.dims(source))
            self._groups_argument(path, place, node)

    def new(self, dim: Dim) -> int:
        """The size of a dim after the cut."""
        return evaluate(dim, lambda a: self.counts.get(a, a.size))

    def of(self, path: str) -> SizesBySite:
        """The places of one module, its own parameters first."""
        return {**self.own.get(path, {}), **self.inner.get(path, {}), **self.below.get(path, {})}

    def _put(self, table: dict[str, SizesBySite], path: str, site: AttributeSite, dims: tuple[Dim, ...]) -> None:
        mine = table.setdefault(path, {})
        for place, dim in enumerate(dims):
            for span, part in spans(dim):
                mine[*site, place, *span] = (part.size, self.new(part))

    def _groups_argument(self, path: str, place: int, node: fx.Node) -> None:
        """The number of groups of a convolution is a size too, though no dim shows it alone."""
        name = getattr(node.target, "__name__", "")
        if name.startswith("conv") and len(node.args) > 1:
            x, weight = node.args[0], node.args[1]
            if isinstance(x, fx.Node) and isinstance(weight, fx.Node):
                # Dim 1 of the weight is what one group reads, or, transposed, what it makes.
                whole = self.groups.axes.dims(node if name.startswith("conv_transpose") else x)
                channels, per_group = whole[1], self.groups.axes.dims(weight)[1]
                old = channels.size // per_group.size
                self.inner.setdefault(path, {})["groups", place] = (old, self.new(channels) // self.new(per_group))


def _choices(model: nn.Module, sites: _Sites, reads: Mapping[str, Mapping[str, int]]) -> Iterator[_Choice]:
    by_class: dict[type, list[str]] = {}
    for path, module in model.named_modules():
        if any(old != new for old, new in sites.of(path).values()):
            by_class.setdefault(type(module), []).append(path)
    for paths in by_class.values():
        tables = [{**vars(model.get_submodule(p)), **reads.get(p, {})} for p in paths]
        made_by = _constructor_dims(model.get_submodule(paths[0]))
        for attribute in tables[0]:
            values = [table.get(attribute) for table in tables]
            if not attribute.startswith("_") and all(_is_size(v) for v in values):
                options = _options(values, [sites.of(p) for p in paths], made_by.get(attribute))
                yield _Choice(paths, attribute, options)


def _config_reads(model: nn.Module, feed: Inputs) -> dict[str, dict[str, int]]:
    """The numbers each module's forward takes from its config (``config.num_attention_heads``), found by running it."""
    watched = copied(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    found: dict[str, dict[str, int]] = {}
    for path, module in watched.named_modules():
        if hasattr(getattr(module, "config", None), "to_dict"):
            module.config = _watcher(module.config, found.setdefault(path, {}))
    try:
        with evaluation(watched), torch.no_grad():
            run(watched, feed)
    except Exception:  # code that minds the class of its config: what was read until then is known
        pass
    return found


def _watcher(config: Any, read: dict[str, int]) -> Any:
    """A copy of ``config`` that notes the numbers read from it."""
    kind: Any = type(config)

    def note(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if _is_size(value) and not name.startswith("_"):
            read[f"config.{name}"] = value
        return value

    seen = copy.copy(config)
    seen.__class__ = type(kind.__name__, (kind,), {"__getattribute__": note})
    return seen


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_size(v) and not isinstance(v, (tuple, list)) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _options(values: list[Any], sizes: list[SizesBySite], made: AttributeSite | None) -> list[list[Any]]:
    """The vectors of new values, without the one that changes nothing when it is the only one."""
    if isinstance(values[0], (tuple, list)):
        parts = [_options([v[i] for v in values], sizes, None) for i in range(len(values[0]))]
        firsts: list[list[Any]] = [p[0] if p else [v[i] for v in values] for i, p in enumerate(parts)]
        changed: list[Any] = [type(values[0])(column) for column in zip(*firsts, strict=True)]
        return [] if changed == values else [changed, values]
    if made is not None:
        new = [s.get(made, (v, v))[1] for v, s in zip(values, sizes, strict=True)]
        return [] if new == values else [new]
    common = set(sizes[0]).intersection(*sizes[1:]) if len(sizes) > 1 else set(sizes[0])
    vectors: list[list[Any]] = []
    for site in sizes[0]:
        if site in common and all(s[site][0] == v for v, s in zip(values, sizes, strict=True)):
            new = [s[site][1] for s in sizes]
            if new not in vectors:
                vectors.append(new)
    changed = [v for v in vectors if v != values]
    return [*changed, values] if changed else []


def _constructor_dims(module: nn.Module) -> dict[str, AttributeSite]:
    """Which own parameter dim each integer argument of the constructor makes, by changing it by one.

    Only for modules that hold parameters themselves and whose constructor takes plain values kept as attributes.
    """
    kind, own = _as_constructed(module)
    if not own or any(name != "parametrizations" for name, _ in module.named_children()):
        return {}
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if name in ("device", "dtype") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if hasattr(module, name):
            value = getattr(module, name)
            arguments[name] = value if not isinstance(value, torch.Tensor) else True
        elif parameter.default is parameter.empty:
            return {}
    build = _builder(kind, arguments)
    base = build({})
    if base is None or base != own:
        return {}
    found: dict[str, AttributeSite] = {}
    for name, value in arguments.items():
        if _is_size(value) and not isinstance(value, (tuple, list)):
            moved = build({name: value + 1})
            dims = [] if moved is None else _moved(base, moved)
            if dims and all(base[p][d] == value for p, d in dims):
                found[name] = ("own", *dims[0])
    return found


def _as_constructed(module: nn.Module) -> tuple[type[nn.Module], dict[str, tuple[int, ...]]]:
    """The class and the shapes of the tensors that a constructor made, before parametrizations took their place."""
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if not parametrize.is_parametrized(module):
        return type(module), own
    made: Any = module.parametrizations
    return type(module).__bases__[0], {**{name: tuple(getattr(module, name).shape) for name in made}, **own}


def _parametrized(model: nn.Module, name: str) -> tuple[str, str] | None:
    """The module and the tensor that a parameter stands for, where it has the same shape; None for any other."""
    owner, found, rest = name.rpartition(".parametrizations.")
    tensor, _, leaf = rest.partition(".")
    if not found or not leaf.startswith("original"):
        return None
    module = model.get_submodule(owner)
    stored = getattr(model.get_submodule(parent(name)), leaf)
    return (owner, tensor) if getattr(module, tensor).shape == stored.shape else None


def _builder(kind: type[nn.Module], arguments: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    def build(changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        try:
            with torch.device("meta"):
                made = kind(**{**arguments, **changes})
        except Exception:  # any class of a model may refuse any value: then nothing is learned from it
            return None
        return {n: tuple(p.shape) for n, p in made.named_parameters(recurse=False)}

    return build


def _moved(old: Mapping[str, tuple[int, ...]], new: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    if set(old) != set(new) or any(len(old[n]) != len(new[n]) for n in old):
        return []
    return [(n, d) for n in old for d in range(len(old[n])) if old[n][d] != new[n][d]]
