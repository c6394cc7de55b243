"""Paths of modules and tensors, dotted as ``named_modules`` spells them; that of the whole model is empty."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile


def split(path: str) -> tuple[str, str]:
    """The module that holds ``path``, and its last part."""
    module, _, part = path.rpartition(".")
    return module, part


def parent(path: str) -> str:
    """``path`` without its last part: the module that holds it."""
    return split(path)[0]


def last(path: str) -> str:
    """The last part of ``path``."""
    return split(path)[1]


def inside(path: str, module: str) -> bool:
    """Whether ``path`` is ``module`` or lies in it."""
    return not module or path == module or path.startswith(f"{module}.")


def common(paths: Iterable[str]) -> str:
    """The smallest module that holds all of ``paths``; one path alone is its own."""
    parts = [path.split(".") for path in paths]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared)
