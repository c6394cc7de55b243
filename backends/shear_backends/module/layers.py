"""Whole layers of a model's lists removed, and what counts layers brought after them: indices and the config.

No table says which attribute is an index: it is one when it is the place of its layer, or off by the same, in all
layers of the list that have it. The config's fields are found by building the class on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shear_ir.errors import ShearingError
from shear_ir.paths import split
from shear_ir.plans import original, renumbered

FieldPath = tuple[str | int, ...]
"""The way to a config field: attribute names, and a place in a list."""
Lists = dict[str, list[int]]
"""A list of modules to the numbers of those that stay."""
_Key = tuple[str, str]


def staying(model: nn.Module, gone: Sequence[str]) -> Lists:
    """The lists that lose layers, with what stays; raises ``ShearingError`` for what is in no list of modules."""
    found: Lists = {}
    for path in gone:
        up, number = split(path)
        holder = model.get_submodule(up)
        if not isinstance(holder, nn.ModuleList | nn.Sequential):
            raise ShearingError(f"{path} is in no list of modules that could close the gap: use the graph backend")
        found.setdefault(up, list(range(len(holder)))).remove(int(number))
    return found


def drop_layers(model: nn.Module, gone: Sequence[str], dense: nn.Module) -> bool:
    """Remove the modules ``gone`` from ``model``, a copy of ``dense``, with indices and configs after them.

    Whether the class builds exactly this model from its config now.
    """
    lists = staying(dense, gone)
    for up, kept in lists.items():
        layers = dict(model.get_submodule(up).named_children())
        indices = _indices(list(layers.values()))
        for place, number in enumerate(kept):
            _count(layers[str(number)], {key: place + off for key, off in indices.items()})
    for up in sorted(lists, key=lambda path: -path.count(".")):
        holder = model.get_submodule(up)
        holder._modules = {str(place): holder._modules[str(number)] for place, number in enumerate(lists[up])}
    return _configure(model, gone, dense, lists)


def _indices(layers: Sequence[nn.Module]) -> dict[_Key, int]:
    """Attributes that hold the place of their layer, as (path in the layer, name), with what they are off by."""
    values: dict[_Key, dict[int, int]] = {}
    for place, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and not name.startswith("_"):
                    values.setdefault((path, name), {})[place] = value
    offs = {key: {value - place for place, value in found.items()} for key, found in values.items()}
    sure = {key: off.pop() for key, off in offs.items() if len(off) == 1 and len(values[key]) > 1}
    # The only layer of its kind says nothing by itself: of a hybrid's one attention, another's attribute tells.
    names = {name for (_, name), off in sure.items() if off == 0}
    return sure | {key: 0 for key, off in offs.items() if off == {0} and key[1] in names}


def _count(layer: nn.Module, values: Mapping[_Key, int]) -> None:
    modules = dict(layer.named_modules())
    for (path, name), value in values.items():
        if path in modules and type(vars(modules[path]).get(name)) is int:
            setattr(modules[path], name, value)


def _configure(model: nn.Module, gone: Sequence[str], dense: nn.Module, lists: Lists) -> bool:
    """Bring the configs that modules hold after the layers; whether the class builds this very model from its own."""
    config = getattr(dense, "config", None)
    if not hasattr(config, "to_dict"):
        return False
    target = _shapes(model)
    changes = _changes(dense, target, lists)
    fresh = _built(type(dense), _changed(config, changes))
    before = _built(type(dense), config)
    if not changes or fresh is None or before is None:
        return False
    olds, news = dict(before.named_modules()), dict(fresh.named_modules())
    seen: set[int] = set()
    for path, module in model.named_modules():
        mine, old, new = (getattr(m, "config", None) for m in (module, olds.get(original(path, gone)), news.get(path)))
        if hasattr(mine, "to_dict") and id(mine) not in seen and None not in (old, new):
            seen.add(id(mine))
            _follow(mine, old, new)
        if path in olds and path in news and not any(path.startswith(up + ".") for up in lists):
            _adopt(module, olds[path], news[path])
    return _shapes(fresh) == target and _alike(model, fresh)


def _follow(mine: Any, old: Any, new: Any) -> None:
    """Set in ``mine`` what differs between the configs that the class made before and makes now."""
    for name, value in vars(new).items():
        known = vars(old).get(name)
        if hasattr(value, "to_dict"):
            _follow(getattr(mine, name), known, value)
        elif not name.startswith("_") and value != known:
            setattr(mine, name, copy.deepcopy(value))


def _adopt(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Set the plain attributes that the class derives from fields that changed, outside of the layers themselves."""
    was, now = plain(old)[1], plain(new)[1]
    for name, value in now.items():
        if value != was.get(name) and vars(module).get(name) == was.get(name):
            setattr(module, name, copy.deepcopy(value))
    for name in was.keys() - now.keys():
        if vars(module).get(name) == was[name]:
            delattr(module, name)


def _changes(dense: nn.Module, target: Mapping[str, Any], lists: Lists) -> dict[FieldPath, Any]:
    """The fields that say how many layers there are, with the lists and counts beside them that have to follow.

    Fields are taken as they bring the built shapes nearer to ``target``; what does not move them is left alone, but
    for lists with one entry per layer.
    """
    changes: dict[FieldPath, Any] = {}
    missing = _missed(dense, changes, target)
    for kept, count in ((kept, len(list(dense.get_submodule(up).children()))) for up, kept in lists.items()):
        fields = list(_values(dense.config))
        along = {f: [v[i] for i in kept] for f, v in fields if isinstance(v, list) and len(v) == count}
        ways = [*_lengths(fields, count, len(kept), along), along]
        # The best of them, and then what still has to go with it.
        while missing != 0:
            tried = [
                (missed, more) for more in ways if (missed := _missed(dense, {**changes, **more}, target)) is not None
            ]
            best = min(tried, key=lambda found: found[0], default=None)
            if best is None or (missing is not None and best[0] >= missing):
                break
            missing, changes = best[0], {**changes, **best[1]}
        for more in _counting(fields, kept, count) if missing else ():
            missed = _missed(dense, {**changes, **more}, target)
            if missed is not None and (missing is None or missed < missing):
                changes, missing = {**changes, **more}, missed
    return changes


def _lengths(
    fields: Sequence[tuple[FieldPath, Any]], count: int, left: int, along: Mapping[FieldPath, Any]
) -> Iterator[dict[FieldPath, Any]]:
    """Fields that may say how many layers there are, with the lists beside them and without."""
    for field, value in fields:
        if type(value) is int and value == count:
            yield {field: left, **{f: v for f, v in along.items() if f[:-1] == field[:-1]}}
            yield {field: left}


def _counting(
    fields: Sequence[tuple[FieldPath, Any]], kept: Sequence[int], count: int
) -> Iterator[dict[FieldPath, Any]]:
    """Fields that may say how many of the first layers are of a kind, or which are."""
    for field, value in fields:
        if type(value) is int and 0 < value < count:
            yield {field: sum(number < value for number in kept)}
        elif isinstance(value, list) and value and all(type(v) is int and 0 <= v < count for v in value):
            yield {field: [kept.index(v) for v in value if v in kept]}


def _missed(dense: nn.Module, changes: Mapping[FieldPath, Any], target: Mapping[str, Any]) -> int | None:
    """How many tensors a model with these fields has that it should not have, or lacks; None when it is refused."""
    try:
        config = _changed(dense.config, changes)
    except IndexError:  # a place in a list that another change has shortened
        return None
    built = _built(type(dense), config)
    return None if built is None else len(set(_shapes(built).items()) ^ set(target.items()))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What is saved of a model; buffers that are not are made from the config anew."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def _changed(config: Any, changes: Mapping[FieldPath, Any]) -> Any:
    """A copy of ``config`` with the given fields; one that its class refuses is left for the constructor to refuse."""
    made = copy.deepcopy(config)
    for (*parents, last), value in changes.items():
        owner: Any = made
        for part in parents:
            owner = getattr(owner, str(part))
        (owner if isinstance(last, int) else vars(owner))[last] = value
    return made


def _values(config: Any, prefix: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """The numbers and lists of a config and of its sub-configs."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from _values(value, (*prefix, name))
        elif type(value) is int or isinstance(value, list):
            yield (*prefix, name), value
            entries = value if isinstance(value, list) else ()
            yield from (((*prefix, name, place), entry) for place, entry in enumerate(entries) if type(entry) is int)


def _built(kind: type[nn.Module], config: Any) -> nn.Module | None:
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            return kind(copy.deepcopy(config))
    except Exception:  # any constructor may refuse any config
        return None


def _alike(model: nn.Module, fresh: nn.Module) -> bool:
    """Whether both have the same modules with the same plain attributes; those say more than shapes, as windows do."""
    mine, theirs = dict(model.named_modules()), dict(fresh.named_modules())
    return mine.keys() == theirs.keys() and all(plain(mine[path]) == plain(theirs[path]) for path in mine)


def plain(module: nn.Module) -> tuple[type, dict[str, Any]]:
    """The class of a module and its attributes that are numbers, texts, or sequences of such."""
    kinds = (bool, int, float, str, tuple, list)
    values = vars(module).items()
    return type(module), {n: v for n, v in values if type(v) in kinds and n != "training" and not n.startswith("_")}


def stays(path: str, gone: Sequence[str]) -> bool:
    """Whether a module is still there without ``gone``."""
    return not path or renumbered(path, gone) is not None


def moved(path: str, gone: Sequence[str]) -> str:
    """The new path of a module that stays; its own, where it is gone."""
    return renumbered(path, gone) or path
