"""What files of strangers, and kills at any moment, end in: a table of the whole corpus, see tools/bench/README.md.

    python tools/bench/faults.py                   # files and kills
    python tools/bench/faults.py files -k plan     # files whose name has "plan" in it, and what each is told
    python tools/bench/faults.py kills --every 3   # killed at every third of the places

Every case runs in a process of its own, forked from one that has imported everything, with a limit of time and of
memory. A file has to end in exit code 2 and one sentence of less than 300 characters, import nothing and leave nothing
behind. A kill comes at each file that is made, renamed or removed in turn, which an audit hook finds; the same command
run again has to end with the same bytes as one that was never killed, and with nothing beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "passes"), str(ROOT / "backends"), str(ROOT / "tools")]

SECONDS, MEMORY = 20.0, 1.5 * 2**30
_LONG = 600.0
HOSTILE = "from pathlib import Path\nPath(__file__).with_name('marker').write_text('imported')\n"
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "shutil.move")

app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``killed``: by which signal, or by a limit; ``memory``: bytes at most."""

    code: int | None
    killed: str
    seconds: float
    memory: float
    out: str
    err: str


def run(
    command: Sequence[str], here: Path, before: Callable[[], None] = lambda: None, seconds: float = SECONDS
) -> Ended:  # fmt: skip
    """The command line in a fork of this process, in the folder ``here``, for so many ``seconds`` at most."""
    logs = {name: here.parent / name for name in ("stdout", "stderr")}
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be(command, here, logs, before)
    killed = ""
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > seconds or _resident(child) > MEMORY:
            killed = "time" if _resident(child) <= MEMORY else "memory"
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    if not killed and os.WIFSIGNALED(status):
        killed = signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    told = (path.read_text(errors="replace") for path in logs.values())
    return Ended(code, killed, time.monotonic() - started, used.ru_maxrss * 1024.0, *told)


def _be(command: Sequence[str], here: Path, logs: dict[str, Path], before: Callable[[], None]) -> None:
    """Become the command line; does not return."""
    code = 70
    try:
        for number, path in enumerate(logs.values(), start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(here)
        sys.path.insert(0, str(here))
        before()
        from shear_tools.cli import main

        main(list(command))
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _resident(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, IndexError):
        return 0.0


@contextlib.contextmanager
def _copy(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        here = Path(place) / "here"
        shutil.copytree(whole, here)
        yield here


def wrong(ended: Ended, here: Path, before: list[str], said: str) -> str:
    """What is not as it has to be; empty where all is."""
    if ended.killed:
        return f"killed by {ended.killed}"
    if ended.code != 2:
        return f"exit code {ended.code}"
    if ended.out or not ended.err.startswith("error: ") or ended.err.count("\n") != 1:
        return "more than a sentence"
    if len(ended.err) > 308 or not ended.err.strip().isprintable():
        return f"a sentence of {len(ended.err)} characters"
    if (here / "marker").exists():
        return "code of a file ran"
    if left := sorted(set(_listed(here)) - set(before)):
        return f"left {left[0]}"
    return "" if said in ended.err else f"says nothing of {said}"


def _listed(here: Path) -> list[str]:
    return [str(path.relative_to(here)) for path in here.rglob("*") if "__pycache__" not in path.parts]


@app.command()
def files(k: Annotated[str, typer.Option("-k", help="Only cases with this in their names.")] = "") -> None:
    """The corpus of tests/cli/strangers.py."""
    from tests.cli.strangers import CASES

    rows: dict[str, list[tuple[Ended, str]]] = {}
    with _whole() as whole:
        for case in (each for each in CASES if k in each.name):
            with _copy(whole) as here:
                (here / "evil.py").write_text(HOSTILE)
                case.edit(here)
                before = _listed(here)
                ended = run(case.command, here)
                fault = wrong(ended, here, before, case.said)
            rows.setdefault(case.name.partition(":")[0].partition(" ")[0], []).append((ended, fault))
            if fault or k:
                console.print(f"{case.name}: {fault or 'told'}: {ended.err.strip()}", markup=False, highlight=False)
    made = Table("files", "cases", "told", "seconds at most", "MiB at most", title="files of strangers")
    for kind, found in rows.items():
        told = sum(not fault for _, fault in found)
        seconds, memory = max(e.seconds for e, _ in found), max(e.memory for e, _ in found) / 2**20
        made.add_row(kind, str(len(found)), str(told), f"{seconds:.1f}", f"{memory:.0f}")
    console.print(made)
    if any(fault for found in rows.values() for _, fault in found):
        raise typer.Exit(1)


KILLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prune": (("prune", "model", "--ratio", "0.2", "-o", "out", "--plan-out", "made.json"), ("out", "made.json")),
    "prune --force": (("prune", "model", "--ratio", "0.2", "-o", "small", "--force"), ("small",)),
    "project": (("project", "ad", "--plan", "plan.json", "-o", "out"), ("out",)),
    "knowledge": (("knowledge", "model", "--data", "data.yaml", "-o", "made.json"), ("made.json",)),
    "sweep": (
        ("sweep", "model", "--data", "data.yaml", "--ratio", "0.2", "--repair", "none", "-o", "made.json"),
        ("made.json",),
    ),
}  # fmt: skip
"""What is killed, and what it writes."""


@app.command()
def kills(
    every: Annotated[int, typer.Option(min=1, help="Kill at one of so many places.")] = 1,
    command: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KILLS)}; repeatable.")] = None,
) -> None:
    """Kills at every file that is made, renamed or removed."""
    made = Table("command", "places", "same bytes after the rerun", "nothing left", title="kills")
    bad = False
    with _whole() as whole:
        for name in command or KILLS:
            places, same, clean = _killed(whole, *KILLS[name], every)
            made.add_row(name, str(places), str(same), str(clean))
            bad |= not places == same == clean
    console.print(made)
    if bad:
        raise typer.Exit(1)


def _killed(whole: Path, command: tuple[str, ...], outs: tuple[str, ...], every: int) -> tuple[int, int, int]:
    """The places at which the command was killed, after how many the rerun gave the same, and left nothing else."""
    with _copy(whole) as here:
        ended = run(command, here, lambda: _hook(here, None), _LONG)
        if ended.code:
            raise SystemExit(f"{' '.join(command)} ends with {ended.code}: {ended.err}")
        wanted, listed = _bytes(here, outs), _listed(here)
        count = int((here.parent / "count").read_text())
    same = clean = 0
    numbers = range(0, count, every)
    for number in numbers:
        with _copy(whole) as here:
            first = run(command, here, lambda n=number, at=here: _hook(at, n), _LONG)  # type: ignore[misc]
            again = run(command, here, seconds=_LONG)
            # Whoever was killed after the last rename is told that it is done.
            done = again.code == 0 or (again.code == 2 and "exists already" in again.err)
            alike = first.killed == "SIGKILL" and done and _bytes(here, outs) == wanted
            left = sorted(set(_listed(here)) - set(listed))
            same, clean = same + alike, clean + (not left)
            if not alike or left:
                ends = f"{again.killed} {again.err.strip()}"
                console.print(f"{command[0]} killed at {number} ({first.killed}): {ends} left {left[:2]}")
    return len(numbers), same, clean


def _hook(here: Path, last: int | None) -> None:
    """Kill this process at the change of a file under ``here`` that has the number ``last``; count them for None."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            mode = arguments[2] if isinstance(arguments[2], int) else 0
            if not mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in WRITES:
            return
        if not isinstance(arguments[0], (str, bytes)) or not os.fsdecode(arguments[0]).startswith(
            ("out", ".", "made", "small", str(here))
        ):
            return
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        if last is None:
            count = os.open(here.parent / "count", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(count, str(seen).encode())
            os.close(count)

    sys.addaudithook(watch)


def _bytes(here: Path, outs: tuple[str, ...]) -> dict[str, str]:
    """A digest of every file of a result."""
    found = [path for out in outs for path in ([here / out] if (here / out).is_file() else (here / out).rglob("*"))]
    return {str(p.relative_to(here)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found if p.is_file()}


@contextlib.contextmanager
def _whole() -> Iterator[Path]:
    """What every case begins with; and all modules that a command may want, for forks have them then."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    import shear_tools.cli.app
    import shear_tools.workflow.run  # noqa: F401
    from tests.cli.strangers import build

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        yield build(Path(place) / "whole")


@app.callback(invoke_without_command=True)
def _all(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        files("")
        kills(1, None)


if __name__ == "__main__":
    app()
