"""The one mouth: files are read here, as bounded and well-formed data, for anybody may have written them."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)

DOCUMENT = 256 * 2**20
"""Bytes of a document at most: a plan of the largest models has a hundred million."""

_DEEPEST = 64
_LONGEST = 1024
_ENTRIES = 2**25
_WORD = 2**63


class Unreadable(ValueError):
    """Why a file cannot be used, as the end of a sentence that names it."""


def require_regular(path: Path, largest: int | None = None) -> None:
    """Raise ``Unreadable`` unless ``path`` is a regular file, of ``largest`` bytes at most, that can be opened."""
    with _opened(path, largest):
        pass


def text_in(path: Path, largest: int = DOCUMENT) -> str:
    """The text of a regular file in UTF-8; raises ``Unreadable``."""
    with _opened(path, largest) as handle, reasons():
        with os.fdopen(handle, "rb", closefd=False) as file:
            read = file.read(largest + 1)
        if len(read) > largest:
            raise Unreadable(f"it has more than {largest:,} bytes")
        return read.decode("utf-8")


def json_in(path: Path, largest: int = DOCUMENT, *, infinite: bool = False, loose: bool = False) -> Any:
    """The JSON document in ``path``; raises ``Unreadable``. The options are those of ``require_sound``."""
    return json_of(text_in(path, largest), infinite=infinite, loose=loose)


def document_in(path: Path, kind: type[M], *, infinite: bool = False) -> M:
    """The document of this ``kind`` in ``path``; raises ``Unreadable`` with the first place that is wrong."""
    return document_of(text_in(path), kind, infinite=infinite)


def document_of(text: str, kind: type[M], *, infinite: bool = False) -> M:
    """The document of this ``kind`` that ``text`` is; raises ``Unreadable`` with the first place that is wrong."""
    try:
        read = json_of(text, infinite=infinite)
    except Unreadable as failure:
        raise Unreadable(f"Invalid JSON: {failure}") from failure
    try:
        return kind.model_validate(read)
    except ValidationError as failure:
        raise Unreadable(first_error(failure)) from failure


def first_error(failure: ValidationError) -> str:
    """The first place that is wrong, and what is wrong with it."""
    first = failure.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    reason = first["msg"].removeprefix("Value error, ")
    return f"{place}: {reason[:1].lower()}{reason[1:]}" if place else reason


def json_of(text: str | bytes, *, infinite: bool = False, loose: bool = False) -> Any:
    """The JSON document that ``text`` is; raises ``Unreadable``. The options are those of ``require_sound``."""
    with reasons():
        document = json.loads(text)
    require_sound(document, infinite=infinite, loose=loose)
    return document


def require_sound(
    document: Any, *, infinite: bool = False, loose: bool = False, entries: int = _ENTRIES
) -> None:  # fmt: skip
    """Raise ``Unreadable`` for what no writer of ours makes and some reader breaks on.

    That is a document nested too deep or with too many entries (aliases count as often as they are met), names of
    thousands of characters, text that is no Unicode or has a NUL in it, and numbers that are none or out of range.
    ``infinite``: numbers may be infinite, or of any size, as in configs they are. ``loose``: of rows of data, which are
    full of anything, only how deep they are.
    """
    left: list[tuple[Any, int]] = [(document, 0)]
    while left:
        value, depth = left.pop()
        entries -= 1
        if depth > _DEEPEST:
            raise Unreadable(f"it is nested more than {_DEEPEST} deep")
        if entries < 0:
            raise Unreadable("it has too many entries")
        if isinstance(value, dict):
            for key in () if loose else value:
                _require_name(key)
            left.extend((each, depth + 1) for each in value.values())
        elif isinstance(value, (list, tuple, set)):
            left.extend((each, depth + 1) for each in value)
        elif loose:
            continue
        elif isinstance(value, str):
            _require_text(value)
        elif isinstance(value, float):
            if math.isnan(value) or (math.isinf(value) and not infinite):
                raise Unreadable(f"it has the number {value}")
        elif isinstance(value, int) and not infinite and not -_WORD <= value < _WORD:
            raise Unreadable("it has a number that needs more than 64 bits")


@contextmanager
def reasons() -> Iterator[None]:
    """Whatever reading a file ends in is ``Unreadable``, with its reason."""
    try:
        yield
    except Unreadable:
        raise
    except UnicodeDecodeError as failure:
        raise Unreadable(f"it is not UTF-8: {failure.reason} at byte {failure.start}") from failure
    except RecursionError as failure:
        raise Unreadable("it is nested too deep") from failure
    except MemoryError as failure:
        raise Unreadable("there is not enough memory for it") from failure
    except OSError as failure:
        raise Unreadable(failure.strerror or str(failure)) from failure
    except (ValueError, LookupError) as failure:
        raise Unreadable(str(failure) or type(failure).__name__) from failure


def contains(folder: Path, file: Path) -> bool:
    """Whether ``file`` lies in ``folder`` when all links are followed, or in the hub's cache, in its repository."""
    folder = folder.resolve()
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return file.resolve().is_relative_to(folder.parent.parent if in_cache else folder)


@contextmanager
def _opened(path: Path, largest: int | None) -> Iterator[int]:
    with reasons():
        # A pipe or a device would keep one waiting, or never end.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        told = os.fstat(handle)
        if not stat.S_ISREG(told.st_mode):
            raise Unreadable("it is a folder" if stat.S_ISDIR(told.st_mode) else "it is no regular file")
        if largest is not None and told.st_size > largest:
            raise Unreadable(f"it has {told.st_size:,} bytes, and no such file has more than {largest:,}")
        yield handle
    finally:
        os.close(handle)


def _require_name(key: Any) -> None:
    if isinstance(key, str):
        _require_text(key)
        if len(key) > _LONGEST:
            raise Unreadable(f"it has a name of {len(key):,} characters")


def _require_text(text: str) -> None:
    if "\0" in text:
        raise Unreadable("it has a text with a NUL in it")
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise Unreadable("it has a text that is no Unicode (half of a surrogate pair)")
