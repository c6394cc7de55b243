"""The command line, one file per command. Every failure is one sentence on stderr and an exit code.

0: done. 1: verify found OUT unsound, or a fault of shear-ir. 2: bad input. 129, 130, 143: SIGHUP, SIGINT, SIGTERM.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from shear_ir.errors import ShearError

DEBUG = "--debug"
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LONGEST = 290
"""Characters of a sentence; what names a file or its contents may be of any length."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP; no ``except Exception`` on the way up stops it, so that every folder is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line on ``arguments`` (those of the process when None) and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    _return_large_memory()
    try:
        with _interruptible(), _quiet(unless=debug):
            code = _run([a for a in given if a != DEBUG], debug)
    except Interrupted as stop:
        print("interrupted", file=sys.stderr)
        code = 128 + stop.number
    raise SystemExit(code)


def _return_large_memory() -> None:
    """Give tensors of a MiB or more pages of their own, so that what is freed goes back.

    Left alone, glibc comes to keep tensors of up to 32 MiB on its heap, where a few small ones between them hold all of
    it. Other C libraries have no such switch.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        from shear_tools.cli.app import app

        code = app(arguments or ["--help"], prog_name="shear-ir", standalone_mode=False)
        sys.stdout.flush()
        return (code or 0) if arguments else 2
    except BrokenPipeError:
        # The reader, such as head, has had enough: nothing more is written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as failure:
        if debug:
            import traceback

            traceback.print_exc()
        sentence, code = _told(failure)
        print(f"error: {sentence}", file=sys.stderr)
        return code


def _told(failure: Exception) -> tuple[str, int]:
    """What is wrong in one sentence, and the exit code."""
    said = _short(str(failure))
    if isinstance(failure, ShearError):
        return said, 2
    if isinstance(failure, OSError) and failure.strerror:
        return _short(f"{failure.filename or 'a file'} cannot be used: {failure.strerror}"), 2
    if isinstance(failure, MemoryError) or "can't allocate memory" in said:
        return "there is not enough memory for this here", 2
    # Typer may bring its own click, so its errors are known by what they can do: these are about what was typed.
    mistyped = getattr(failure, "format_message", None)
    if mistyped is not None:
        context = getattr(failure, "ctx", None)
        command = context.command_path if context is not None else "shear-ir"
        return f"{' '.join(mistyped().split()).rstrip('.')}; see {command} --help", 2
    if isinstance(failure, ModuleNotFoundError) and failure.name and not failure.name.startswith("shear_"):
        return f"this needs {failure.name.partition('.')[0]}, which is not installed: pip install 'shear-ir[train]'", 2
    kind = type(failure).__name__ + (f" ({said})" if said else "")
    return f"shear-ir failed with {kind}: please report it with what {DEBUG} shows", 1


def _short(text: str) -> str:
    """One line that a terminal can show; of a long one, the beginning and the end."""
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 63]} ... {line[-58:]}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` on SIGINT, SIGTERM and SIGHUP, where they are not ignored."""
    last = -math.inf

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal last
        # Wrappers hand on the signal that the terminal has sent to everybody: the second must not disturb the tidying.
        if time.monotonic() - last > 1.0:
            last = time.monotonic()
            raise Interrupted(number)

    replaced = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                replaced[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def _quiet(unless: bool) -> Iterator[None]:
    """Without the warnings and log lines of the libraries below, which are not about what the user typed."""
    if unless:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
