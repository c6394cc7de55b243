"""Output folders: written beside, then renamed; they appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shear_ir.errors import SaveError, ShearError

_OURS = ("shear_ir.json", "shear_ir_adapter.json")
"""Files by which a folder is known to be of shear-ir's own writing."""

_REPLACED = "replaced"


def refuse_existing(out: Path, force: bool) -> None:
    """Raise ``SaveError`` when ``out`` may not be written: it exists, or its parent does not."""
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
        with _locked(beside):
            yield beside
            os.chmod(beside, 0o755)
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
    refuse_existing(out, force)
    old = _hidden(out, "old")
    with _locked(old):
        try:
            os.rename(out, old / _REPLACED)
            os.rename(beside, out)
        finally:
            # An interrupt may come between the two: what was there is put back before anything is removed.
            _put_back(old, out)
            shutil.rmtree(old, ignore_errors=True)


def tidy(out: Path) -> None:
    """Remove what killed writers of ``out`` have left beside it; a result that one was replacing is put back.

    A folder that a writer still holds is left alone, as is everything of another name.
    """
    ours = re.compile(re.escape(f".{out.name}.") + r"shear-ir-(new|old)-\w{8}")
    for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
        with _locked(left) as held:
            if held and not left.is_symlink():
                _put_back(left, out)
                shutil.rmtree(left, ignore_errors=True)


def _hidden(out: Path, what: str) -> Path:
    """A new folder beside ``out``, of a name by which ``tidy`` knows it."""
    return Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.shear-ir-{what}-"))


def _put_back(old: Path, out: Path) -> None:
    if not out.exists() and "-old-" in old.name and (old / _REPLACED).is_dir():
        os.rename(old / _REPLACED, out)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder until the end of the block or of the process; False where another does, or where none can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        import fcntl  # not on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
