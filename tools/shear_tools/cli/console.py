"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shear_ir.errors import SaveError

if TYPE_CHECKING:
    from rich.table import Table

_WIDE = 200
"""Columns of a table that no terminal limits."""


class Steps:
    """Long work, step by step: each step is shown on a terminal while it runs, and timed.

    with Steps("loading", "tracing") as step:
        with step("loading"):
            ...
    """

    def __init__(self, *names: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.seconds: dict[str, float] = {}
        console = Console(stderr=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(names[0], total=len(names))

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run one step; what foreign code prints meanwhile goes to stderr, for stdout is for results."""
        self._progress.update(self._task, description=name)
        started = time.perf_counter()
        with redirect_stdout(sys.stderr):
            yield
        self.seconds[name] = time.perf_counter() - started
        self._progress.advance(self._task)

    def tell(self, what: str, done: int, total: int | None) -> None:
        """How far the step at hand is."""
        self._progress.update(self._task, description=f"{what} {done}/{'?' if total is None else total}")


class Told:
    """Long work that says how far it is: call it with what is being done, how much is done, and how much there is.

    with Told() as told:
        prepare(..., progress=told)
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
        # Of the processes that accelerate launches, the first alone says how far they are.
        silent = not console.is_terminal or os.environ.get("RANK", "0") != "0"
        self._progress = Progress(*columns, console=console, transient=True, disable=silent)
        self._task = self._progress.add_task("", total=None)
        self._what = ""
        self._out = redirect_stdout(sys.stderr)

    def __enter__(self) -> Told:
        self._progress.start()
        # What foreign code prints meanwhile goes to stderr, for stdout is for results.
        self._out.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.__exit__(kind, error, trace)
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show it; what is new begins its own time."""
        if what != self._what:
            self._what = what
            self._progress.reset(self._task, description=what, total=total)
        self._progress.update(self._task, completed=done, total=total)


def put_json(document: Any) -> None:
    """Print a JSON document; numbers that JSON does not have are null."""
    print(json.dumps(_finite(document), indent=2))


def put_lines(*lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        print(line)


def put_table(made: Table) -> None:
    """Print a table, as wide as the terminal, or as it needs where there is none."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    Console(file=sys.stdout, markup=False, highlight=False, width=width).print(made)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A table of text; the columns named in ``right`` hold numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        made.add_column(Text(heading), justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def warn(sentence: str) -> None:
    """A sentence of warning on stderr."""
    print(f"warning: {sentence}", file=sys.stderr)


def refuse_file(path: Path | None, *suffixes: str) -> None:
    """Raise ``SaveError`` when the file ``path`` cannot be written, before any long work."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise SaveError(f"{path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise SaveError(f"{path} is a folder, not a file")
    if not path.parent.is_dir():
        raise SaveError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise SaveError(f"{path} cannot be written: nothing may be put in {path.parent}")


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all; raises ``SaveError``."""
    from shear_ir.writing import write_text

    try:
        write_text(path, text)
    except OSError as failure:
        raise SaveError(f"{path} cannot be written: {failure.strerror}") from failure


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
