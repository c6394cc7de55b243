"""Random programs, each traced, cut and compared with its masked original, until so many have been checked.

    python tools/bench/fuzz.py --programs 20000          # goes on where it was; --seed S for others
    python tools/bench/fuzz.py --programs 20000 --table  # what is there, nothing is run

What is generated and what must be true of it stands in ``tests/oracle/fuzz``; one program is one generated module,
told apart by its text, traced and checked: by the tracer under torch.export, one in sixteen by torch.export
itself, through both backends. One that breaks is shrunk and written as text that runs on its own.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
for part in ("tools", "backends", "passes", "."):
    sys.path.insert(0, str(HERE.parents[1] / part))

if TYPE_CHECKING:
    from tests.oracle.fuzz.draft import Sketch

CHUNK = 100
THOROUGH = 16

console = Console()


@dataclass
class Tally:
    """What one run has seen. ``programs``: their texts as short hashes; ``broken``: text and error."""

    run: str
    programs: list[str] = field(default_factory=list)
    untraced: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    frozen: Counter[str] = field(default_factory=Counter)
    modules: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    prunable: int = 0
    bare: int = 0
    plans: int = 0
    moved: int = 0
    undefined: int = 0
    seconds: float = 0.0
    broken: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in what another run has seen."""
        for name, value in vars(other).items():
            if name != "run":
                setattr(self, name, getattr(self, name) + value)


def run_chunk(run: str, number: int, longest: int, known: Set[str]) -> Tally:
    """``CHUNK`` programs that are not ``known``; one that breaks is kept with the smallest that breaks alike."""
    from tests.oracle.fuzz.check import double
    from tests.oracle.fuzz.draft import Choose
    from tests.oracle.fuzz.programs import draft_program

    tally, rng, started = Tally(run), random.Random(f"{run} {number}"), time.process_time()
    for _ in range(CHUNK):
        with double():
            sketch = draft_program(Choose(rng.randint), longest)
        mark = hashlib.sha256(sketch.source.encode()).hexdigest()[:12]
        if mark not in known and mark not in tally.programs:
            tally.programs.append(mark)
            _try_one(sketch, tally, int(mark, 16))
    tally.seconds = time.process_time() - started
    return tally


def _try_one(sketch: Sketch, tally: Tally, seed: int) -> None:
    from tests.oracle.fuzz.check import check
    from tests.oracle.fuzz.shrink import failure_of, shrunk

    thorough = seed % THOROUGH == 0
    try:
        seen = check(sketch, seed=seed, thorough=thorough)
    except Exception:

        def fails(other: Sketch) -> str:
            return failure_of(lambda: check(other, seed=seed, thorough=thorough))

        smallest = shrunk(sketch, fails)
        tally.broken.append((smallest.source, fails(smallest)))
        return
    if seen.untraced:
        tally.untraced[seen.untraced.partition(". Pass inputs")[0][:160]] += 1
    for name in ("ops", "frozen", "modules", "groups", "prunable", "plans", "moved", "undefined"):
        setattr(tally, name, getattr(tally, name) + getattr(seen, name))
    tally.bare += not seen.prunable


def known_tallies(file: Path) -> dict[str, Tally]:
    """What earlier runs have left, the latest of each; a line that was cut off counts as not run."""
    found: dict[str, Tally] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            tally = _tally(json.loads(line))
        except ValueError:
            continue
        found[tally.run] = tally
    return found


def _tally(record: Mapping[str, Any]) -> Tally:
    counters = {name: Counter(record[name]) for name in ("untraced", "ops", "frozen", "modules")}
    return Tally(**{**record, **counters, "broken": [(text, error) for text, error in record["broken"]]})


def total(tallies: Iterable[Tally]) -> Tally:
    """All runs as one, each text counted once."""
    whole = Tally("all")
    for tally in tallies:
        whole.add(tally)
    whole.programs = sorted(set(whole.programs))
    return whole


def table(whole: Tally) -> Table:
    """What was exercised."""
    checked = len(whole.programs) - whole.untraced.total()
    rows = {
        "programs checked": f"{checked:,} ({whole.untraced.total()} more do not trace)",
        "with nothing to prune": f"{whole.bare / max(checked, 1):.1%}",
        "distinct operators": f"{len(whole.ops)}, called {whole.ops.total():,} times",
        "groups": f"{whole.groups:,}, {whole.prunable / max(whole.groups, 1):.1%} of them prunable",
        "plans compared": f"{whole.plans:,}, {whole.moved / max(whole.plans, 1):.1%} of them moved the outputs",
        "no value by chance": f"{whole.undefined:,}, such as 0 / 0, not compared",
        "cut in the modules": f"{whole.modules['cut']:,}, refused {whole.modules['refused']:,}",
        "CPU seconds": f"{whole.seconds:,.0f}, {1000 * whole.seconds / max(checked, 1):.0f} ms a program",
        "broken": str(len(whole.broken)),
    }
    shown = Table(title="random programs", title_justify="left", show_header=False, show_edge=False)
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def show_broken(broken: Sequence[tuple[str, str]]) -> None:
    """Each program that breaks, with what it breaks, the shortest of each kind."""
    for text, error in broken:
        console.rule(style="red")
        console.print(text, markup=False, soft_wrap=True)
        console.print(error, style="red", markup=False, soft_wrap=True)


def main(
    programs: Annotated[int, typer.Option(min=1, help="How many to check, those of earlier runs counted in.")] = 20000,
    seed: Annotated[int, typer.Option(help="Other programs for each.")] = 0,
    longest: Annotated[int, typer.Option(min=1, help="Steps of the longest; a step may be a whole block.")] = 6,
    out: Annotated[Path, typer.Option(help="Folder for fuzz.jsonl, one line a run.")] = HERE / "out",
    only_table: Annotated[bool, typer.Option("--table", help="Print what is there.")] = False,
) -> None:
    """Generate, check, count; exit code 1 when a program breaks."""
    warnings.simplefilter("ignore")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "fuzz.jsonl"
    tallies = known_tallies(file)
    if not only_table:  # what has broken runs again
        tallies = {run: tally for run, tally in tallies.items() if not tally.broken}
    texts = {text for tally in tallies.values() for text in tally.programs}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    fresh: list[tuple[str, str]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("programs", total=programs, completed=len(texts))
        number = 0
        while len(texts) < programs and not only_table:
            run, number = f"{seed}:{longest}:{number}", number + 1
            if run in tallies:
                continue
            tally = run_chunk(run, number, longest, texts)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(vars(tally)) + "\n")
            tallies[run] = tally
            texts.update(tally.programs)
            fresh += tally.broken
            progress.update(
                task, completed=len(texts), description=f"programs, {len(fresh)} broken" if fresh else "programs"
            )
            show_broken(tally.broken)
    whole = total(tallies.values())
    console.print(table(whole))
    console.print(f"written to {file}")
    raise typer.Exit(1 if fresh or (only_table and whole.broken) else 0)


if __name__ == "__main__":
    typer.run(main)
