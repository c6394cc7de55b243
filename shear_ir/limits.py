"""Bounds on what a stranger's file has a library do: a chat template that loops, a pattern that backtracks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from shear_ir.errors import LoadError

SECONDS = 5.0
"""What a template or a pattern takes is milliseconds."""
MEMORY = 1 << 30
"""Bytes beside those that the process has."""


class _Late(BaseException):
    """No ``Exception``: code that is being stopped must not take it for a failure of its own."""


@contextmanager
def bounded(what: str, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise ``LoadError`` about ``what`` when the block takes longer than ``seconds`` or so many bytes more.

    Time is bounded in the main thread, where alone a signal can end a block, and memory where the system keeps limits
    (Linux); elsewhere the block runs as it will.
    """
    try:
        with _in_time(seconds), _in_memory(memory):
            yield
    except _Late:
        raise LoadError(f"{what} takes more than {seconds:g} seconds: it loops or backtracks") from None
    except MemoryError:
        raise LoadError(f"{what} takes more than {memory / 2**30:g} GiB of memory") from None


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _in_memory(more: int) -> Iterator[None]:
    try:
        import resource  # not on Windows

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + more
    if soft != resource.RLIM_INFINITY and soft <= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
