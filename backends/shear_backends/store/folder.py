"""Output folders: written beside, then renamed; they appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shear_ir.errors import SaveError, ShearError
from shear_ir.writing import locked, open_to_readers

_OURS = ("shear_ir.json", "shear_ir_adapter.json")
"""Files by which a folder is known to be of shear-ir's own writing."""

_REPLACED = "replaced"
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def refuse_existing(out: Path, force: bool) -> None:
    """Raise ``SaveError`` when ``out`` cannot be written: it exists, its parent does not, or takes nothing new."""
    try:
        _refuse(out, force)
        # Hours may lie between this and the end.
        os.rmdir(_hidden(out, "new"))
    except OSError as failure:
        raise SaveError(f"{out} cannot be written: {failure.strerror}") from failure


def _refuse(out: Path, force: bool) -> None:
    if out.is_symlink():
        raise SaveError(f"{out} is a link: name the folder itself")
    if out.exists() and not force:
        raise SaveError(f"{out} exists already: choose another folder, or --force to replace it")
    if out.exists() and not out.is_dir():
        raise SaveError(f"{out} is not a folder")
    if out.exists() and any(out.iterdir()) and not any((out / n).exists() for n in _OURS):
        raise SaveError(f"{out} was not written by shear-ir, so it is not replaced even with --force")
    if not out.parent.is_dir():
        raise SaveError(f"the folder {out.parent} does not exist")


@contextmanager
def written_whole(out: Path, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``out`` to write into, renamed to ``out`` at the end; removed when anything fails."""
    refuse_existing(out, force)
    tidy(out)
    try:
        beside = _hidden(out, "new")
    except OSError as failure:
        raise SaveError(f"{out} cannot be written: {failure.strerror}") from failure
    try:
        with locked(beside):
            yield beside
            open_to_readers(beside)
            _put(beside, out, force)
    except ShearError:
        raise
    except (OSError, SafetensorError) as failure:
        raise SaveError(f"{out} cannot be written: {failure}") from failure
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put(beside: Path, out: Path, force: bool) -> None:
    if not out.exists():
        os.rename(beside, out)
        return
    _refuse(out, force)
    if _exchanged(beside, out):
        return
    old = _hidden(out, "old")
    with locked(old):
        try:
            os.rename(out, old / _REPLACED)
            os.rename(beside, out)
        finally:
            # An interrupt may come between the two: what was there is put back before anything is removed.
            _put_back(old, out)
            shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Give two folders each other's name at one stroke; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return not rename(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _EXCHANGE)


def tidy(out: Path) -> None:
    """Remove what killed writers of ``out`` have left beside it; a result that one was replacing is put back.

    A folder that a writer still holds is left alone, as is everything of another name.
    """
    ours = re.compile(re.escape(f".{out.name}.") + r"shear-ir-(new|old)-\w{8}")
    for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
        with locked(left) as held:
            if held and not left.is_symlink():
                _put_back(left, out)
                shutil.rmtree(left, ignore_errors=True)


def _hidden(out: Path, what: str) -> Path:
    """A new folder beside ``out``, of a name by which ``tidy`` knows it."""
    return Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.shear-ir-{what}-"))


def _put_back(old: Path, out: Path) -> None:
    if not out.exists() and "-old-" in old.name and (old / _REPLACED).is_dir():
        os.rename(old / _REPLACED, out)
