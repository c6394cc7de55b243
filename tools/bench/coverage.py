"""Which architectures of transformers are traced, grouped, sheared, proved and saved: docs/coverage/coverage.md.

    python tools/bench/coverage.py                       # all of them: about an hour on one core
    python tools/bench/coverage.py --only 'causal/*'     # goes on where it was; --again measures anew
    python tools/bench/coverage.py --table               # the table of what is there, nothing is run

Every architecture runs in a process of its own with limits on time and memory (tools/bench/coverage_one.py), and its
answer is kept as a file; a finished one is not run again by the same versions of torch, transformers and shear-ir.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for part in ("tools", "backends", "passes", "."):
    sys.path.insert(0, str(ROOT / part))

TASKS = {"causal": "Causal LM", "masked": "Masked LM", "seq2seq": "Seq2seq LM", "image": "Image classification"}
PARTS = ("ffn", "heads", "experts")
Answer = Mapping[str, Any]

console = Console()


@dataclass
class Job:
    """One architecture that is being measured."""

    name: str
    process: Any
    pipe: Any
    started: float = field(default_factory=time.monotonic)
    last: dict[str, Any] = field(default_factory=dict)


def run_all(
    names: Sequence[str], jobs: int, limit: float, memory: int, answer_to: Callable[[str, int, Any], None]
) -> Iterator[dict[str, Any]]:
    """Answers as they come; on Ctrl-C no process is left behind. ``answer_to`` sends those about a name to a pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.coverage_server"])
    waiting: list[str] = list(reversed(names))
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(context, waiting.pop(), memory, answer_to))
            for job in list(running):
                answer = answer_of(job, limit)
                if answer is not None:
                    running.remove(job)
                    yield answer
            time.sleep(0.05)
    finally:
        for job in running:
            job.process.kill()


def prepare() -> None:
    """Let the server that the processes are forked from find everything, and each keep to one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "passes", "backends", "tools"))


def start(context: Any, name: str, memory: int, answer_to: Callable[[str, int, Any], None]) -> Job:
    """The process of one architecture."""
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=answer_to, args=(name, memory, sending), daemon=True)
    process.start()
    sending.close()
    return Job(name, process, receiving)


def answer_of(job: Job, limit: float) -> dict[str, Any] | None:
    """What a process answered; None while it runs. Stages are sent as they are reached, and the last one counts."""
    spent = time.monotonic() - job.started
    over = spent > limit
    alive = job.process.is_alive()  # asked first: what a process sends is there when it has ended
    try:
        while job.pipe.poll():
            job.last = job.pipe.recv()
    except EOFError:
        pass
    last = job.last or {"name": job.name}
    if alive and not over and not last.get("done"):
        return None
    if over:
        job.process.kill()
    job.process.join()
    if not last.get("done"):
        code = job.process.exitcode
        cause = f"not done after {limit:.0f} s" if over else f"the process ended with code {code}"
        last["failure"] = {"stage": last.get("stage", "build"), "cause": cause}
        last["seconds"] = spent
    return last


class Store:
    """Answers as files, each with the versions it was made by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = {name: version(name) for name in ("torch", "transformers", "shear-ir")}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """The file of one architecture."""
        return self.folder / f"{name.replace('/', '--')}.json"

    def get(self, name: str) -> dict[str, Any] | None:
        """The answer that these versions gave; None without one."""
        if not self.path(name).exists():
            return None
        kept: dict[str, Any] = json.loads(self.path(name).read_text())
        return kept["answer"] if kept["versions"] == self.versions else None

    def put(self, answer: Answer) -> None:
        """Keep an answer, whole or not at all."""
        beside = self.folder / "unfinished"
        beside.write_text(json.dumps({"versions": self.versions, "answer": answer}))
        beside.replace(self.path(answer["name"]))


def fresh(answer: Answer) -> str:
    """One line of progress about an answer."""
    failure = answer.get("failure")
    said = f"{failure['stage']}: {failure['cause']}" if failure else ", ".join(
        f"{k} {v}" for k, v in answer.get("sheared", {}).items()) or "nothing to shear"  # fmt: skip
    return f"{answer['name']} ({answer.get('seconds', 0):.0f} s): {said}"


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """The counts that the promise is about."""
    built = [a for a in answers if a.get("built")]
    traced = [a for a in built if a.get("traced")]
    whole = [a for a in traced if whole_road(a)]
    ratios = [a["ratio"] for a in traced if "ratio" in a]
    return {
        "architectures": len(answers),
        "built": len(built),
        "traced": len(traced),
        "sheared soundly in ffn and heads": len(whole),
        "unsound": sorted(a["name"] for a in answers if "unsound" in a.get("sheared", {}).values()),
        "reloaded": sum(1 for a in traced if a.get("reloaded")),
        "stock": sum(1 for a in traced if a.get("stock")),
        "analysis over export": median(ratios) if ratios else None,
    }


def whole_road(answer: Answer) -> bool:
    """Whether channels, and heads where there is attention, were sheared soundly by both backends."""
    sheared = answer.get("sheared", {})
    return all(sheared.get(part) == "sound" for part in wanted(answer))


def wanted(answer: Answer) -> list[str]:
    """What an architecture has to lose: channels, and heads where there is attention.

    One that has heads and nowhere a channel, frozen or not, is all of mixers, as Mamba 2 is.
    """
    if not answer.get("attention"):
        return ["ffn"]
    bare = not answer.get("barriers") and not {"ffn", "conv_channel"} & set(answer.get("groups", ()))
    return ["heads"] if bare else ["ffn", "heads"]


def exceptions(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Every architecture that did not get all the way, with its first cause."""
    return [(a["name"], cause(a)) for a in answers if not whole_road(a)]


def cause(answer: Answer) -> str:
    """Why an architecture did not get all the way."""
    failure = answer.get("failure")
    if failure:
        said = {"build": "cannot be built tiny: ", "run": "does not run: "}.get(failure["stage"], "")
        return said + str(failure["cause"])
    missing = []
    for part in wanted(answer):
        state = answer.get("sheared", {}).get(part)
        if state is None:
            missing.append(f"{part}: {_frozen(answer, part)}")
        elif state != "sound":
            outcome = answer.get("each", {}).get(part, answer)
            why = outcome.get("module_why") or outcome.get("graph_why") or f"difference {outcome.get('module_diff')}"
            missing.append(f"{part} {state}: {why}")
    return "; ".join(missing)


def _frozen(answer: Answer, part: str) -> str:
    frozen = answer.get("frozen", {}).get(part)
    barriers = answer.get("barriers")
    return str(frozen[0][0]) if frozen else str(barriers[0][0]) if barriers else "no group of this kind"


_MARKS = {"sound": "✓", "unsound": "**unsound**", None: ""}


def row(answer: Answer) -> list[str]:
    """The cells of one architecture."""
    sheared = answer.get("sheared", {})
    groups = ", ".join(f"{k} {able}/{n}" for k, (able, n) in answer.get("groups", {}).items() if able)
    return [
        answer["name"].split("/")[1],
        str(answer.get("class", "")),
        "✓" if answer.get("traced") else "",
        f"{answer['export_s']:.2f}" if "export_s" in answer else "",
        f"{answer['trace_s'] + answer['groups_s']:.2f}" if "trace_s" in answer else "",
        f"{answer['ratio']:.2f}" if "ratio" in answer else "",
        groups,
        *(_MARKS.get(sheared.get(part), str(sheared.get(part))) for part in PARTS),
        "" if "reloaded" not in answer else "✓" if answer["reloaded"] else "no",
        "" if "stock" not in answer else "✓" if answer["stock"] else "",
        f"{answer.get('seconds', 0):.0f}",
    ]


HEADER = (
    "type", "class", "traced", "export s", "analysis s", "ratio", "groups that can lose units / all", "ffn", "heads",
    "experts", "reloaded", "stock", "s",
)  # fmt: skip


def markdown(answers: Sequence[Answer], versions: Mapping[str, str], total: int) -> str:
    """The page: what it says, the numbers, the exceptions, one table per task; ``total``: of all architectures."""
    counts = summary(answers)
    said = ", ".join(f"{k} {v}" for k, v in versions.items())
    unsound = ", ".join(counts["unsound"]) or "none"
    lines = [
        "# Architectures",
        "",
        f"Made by `tools/bench/coverage.py` ({said}); every model tiny and random, in a process of its own.",
        "Sheared means by the module backend and by the graph backend, each equal to the masked original on two batch",
        "sizes and lengths (where the graph is fixed to one length, on that one); a quarter of the channels, half of",
        "the heads, a quarter of the experts at once, compared in double precision. An architecture all of mixers,",
        "such as Mamba 2, has heads and no ffn.",
        "Seconds are of the CPU, the least of up to three in turn: of a bare `torch.export`, and of the analysis, that",
        "is trace and groups.",
        "",
        f"- {counts['architectures']} of {total} architectures were measured;",
        f"  {_share(counts['built'], counts['architectures'])} of those were built,",
        f"  {_share(counts['traced'], counts['built'])} of those traced,",
        f"  {_share(counts['sheared soundly in ffn and heads'], counts['traced'])} of those sheared soundly in channels"
        " and, where there is attention, heads",
        f"- unsound: {unsound}",
        f"- {counts['reloaded']} reloaded bit for bit, {counts['stock']} of them by stock transformers",
        f"- analysis over bare export, median: {counts['analysis over export'] or 0:.2f}",
        "",
    ]
    for task, title in TASKS.items():
        rows = [row(a) for a in answers if a["name"].startswith(f"{task}/")]
        if rows:
            lines += [f"## {title}", "", *table(HEADER, rows), ""]
    wrong = exceptions(answers)
    if wrong:
        lines += ["## Exceptions and their first causes", "", *table(("architecture", "cause"), wrong), ""]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else str(part)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("<", "\\<") for cell in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def main(
    out: Annotated[Path, typer.Option(help="Where the answers are kept, one file each.")] = HERE / "out" / "coverage",
    docs: Annotated[Path, typer.Option(help="Where coverage.md goes.")] = ROOT / "docs" / "coverage",
    only: Annotated[list[str] | None, typer.Option(help="Globs on task/type.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 2,
    limit: Annotated[float, typer.Option(help="Seconds for each.")] = 90.0,
    memory: Annotated[int, typer.Option(help="GiB for each.")] = 6,
    again: Annotated[bool, typer.Option("--again", help="Measure finished ones anew.")] = False,
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
) -> None:
    """Measure what is missing, then write the table."""
    prepare()
    from bench import coverage_one

    everything = coverage_one.names()
    chosen = [n for n in everything if not only or any(fnmatch.fnmatch(n, glob) for glob in only)]
    if not chosen:
        raise typer.BadParameter(f"no architecture matches {', '.join(only or [])}")
    store = Store(out)
    missing = [] if only_table else [n for n in chosen if again or store.get(n) is None]
    try:
        _measure(missing, store, jobs, limit, memory)
    except KeyboardInterrupt:
        console.print("stopped: what is done is kept, and the next call goes on from there")
        raise typer.Exit(130) from None
    answers = [answer for n in everything if (answer := store.get(n)) is not None]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "coverage.md").write_text(markdown(answers, store.versions, len(everything)), encoding="utf-8")
    console.print_json(data=summary(answers))
    console.print(Counter(answer.get("failure", {}).get("stage", "no failure") for answer in answers))


def _measure(missing: Sequence[str], store: Store, jobs: int, limit: float, memory: int) -> None:
    from bench import coverage_one

    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        bar = progress.add_task("architectures", total=len(missing))
        for answer in run_all(missing, jobs, limit, memory, coverage_one.answer_to):
            store.put(answer)
            progress.console.print(fresh(answer), markup=False, highlight=False)
            progress.advance(bar)


if __name__ == "__main__":
    typer.run(main)
