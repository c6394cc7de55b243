"""Output folders: written beside, then renamed; they appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shear_ir.errors import SaveError, ShearError

_OURS = ("shear_ir.json", "shear_ir_adapter.json")
"""Files by which a folder is known to be of shear-ir's own writing."""


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
    try:
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as failure:
        raise SaveError(f"{out} cannot be written: {failure.strerror}") from failure
    try:
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
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    try:
        os.rename(out, old / "replaced")
        os.rename(beside, out)
    finally:
        # An interrupt may come between the two: what was there is put back before anything is removed.
        if not out.exists():
            os.rename(old / "replaced", out)
        shutil.rmtree(old, ignore_errors=True)
