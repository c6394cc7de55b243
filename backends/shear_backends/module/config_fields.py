"""The fields of a config of transformers: found, read and changed, in sub-configs and in lists too."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

FieldPath = tuple[str | int, ...]
"""The way to a config field: attribute names, and places in lists."""
Changes = dict[FieldPath, int]


def fields_of(
    config: Any, prefix: FieldPath = (), of: tuple[type, ...] = (int, type(None))
) -> Iterator[tuple[FieldPath, Any]]:
    """The integer and unset fields of a config, of its sub-configs and of its lists (``ffn_dims=[64, 48]``)."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from fields_of(value, (*prefix, name), of)
        elif isinstance(value, list):
            yield from (((*prefix, name, place), entry) for place, entry in enumerate(value) if type(entry) is int)
        elif type(value) in of:
            yield (*prefix, name), value


def get_field(config: Any, path: FieldPath) -> Any:
    """The value at ``path``, None where the config has no such field."""
    for part in path:
        config = config[part] if isinstance(part, int) else getattr(config, part, None)
    return config


def set_field(config: Any, path: FieldPath, value: Any) -> None:
    """Set the value at ``path``; a config class may refuse it, by any exception."""
    *parents, last = path
    owner = get_field(config, tuple(parents))
    if isinstance(last, int):
        owner[last] = value
    else:
        setattr(owner, last, value)


def changed(config: Any, changes: Mapping[FieldPath, Any]) -> Any:
    """A copy of the config with the given fields changed."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        set_field(config, path, value)
    return config


def objection(config: Any) -> str:
    """What the config class itself has against the values of ``config``; empty when nothing."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as failure:  # every config class objects in its own way
        return str(failure.__cause__ or failure).splitlines()[0]
    return ""
