"""Files that are written: there whole or not at all, for whom the user's umask says, and nothing left beside them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all, and remove what killed writers of it have left."""
    _tidy(path)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.shear-ir-")
    try:
        with os.fdopen(handle, "wb") as file:
            held(file.fileno())
            file.write(content)
            file.flush()
            os.chmod(beside, 0o666 & ~umask())
            os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def open_to_readers(folder: Path) -> None:
    """Give a folder and all in it the modes that the umask says, where a library has kept its files to itself."""
    mask = umask()
    for at, _, files in os.walk(folder):
        os.chmod(at, 0o777 & ~mask)
        for name in files:
            os.chmod(os.path.join(at, name), 0o666 & ~mask, follow_symlinks=False)


def placeless(word: str) -> str:
    """A path, or an option with one, without the folders above it: what is handed on names no place of a machine."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def held(handle: int) -> bool:
    """Lock an open file or folder until it is closed; False where another process has, or where none can."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a file or folder until the end of the block or of the process; False where another does, or none can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield held(handle)
    finally:
        os.close(handle)


def _tidy(path: Path) -> None:
    ours = re.compile(re.escape(f".{path.name}.shear-ir-") + r"\w{8}")
    for left in [Path(each.path) for each in os.scandir(path.parent) if ours.fullmatch(each.name)]:
        if left.is_symlink() or not left.is_file():
            continue
        with locked(left) as mine:
            if mine:
                left.unlink(missing_ok=True)
