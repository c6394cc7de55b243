"""How long the road from a model to a smaller one takes, by size, and how much memory: see tools/bench/README.md.

    python tools/bench/analysis.py                 # everything: some twenty minutes on two cores
    python tools/bench/analysis.py --quick         # tiny models, one repeat
    python tools/bench/analysis.py --sizes llama-7b --repeats 5

Every measurement runs in a process of its own (tools/bench/measure.py) and alternates with a bare ``torch.export`` of
the same model, so that a ratio compares two neighbours in time. Writes results.json, results.md and layers.svg.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = ("trace", "axes", "groups", "plan", "rewrite", "check", "cut")

console = Console()


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


MODELS = {
    "tiny": Shape(64, 176, 2, 4, 2, 1000),
    "llama-1.5b": Shape(2048, 5632, 32, 32, 4, 32000),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "llama-405b": Shape(16384, 53248, 126, 128, 8, 128256),
}
ONCE = ("llama-405b",)
LAYERS = (2, 4, 8, 16, 32, 64)
WIDTHS = (256, 1024, 4096, 16384)
PARTS = {
    "models": "Models on the meta device",
    "layers": "More layers of one width (hidden 2048)",
    "widths": "Wider layers, eight of them",
    "rivals": "Beside torch-pruning",
}
# torch-pruning walks channel indices and runs the model, so these have weights; the first is one it is told how to do.
RIVALS = {
    "8 layers, 8 heads": Shape(512, 1408, 8, 8, 8, 8000),
    "8 layers, 8 heads on 2 kv": Shape(512, 1408, 8, 8, 2, 8000),
    "8 layers, 8 heads on 4 kv": Shape(512, 1408, 8, 8, 4, 8000),
    "1.5B, 32 heads": Shape(2048, 5632, 32, 32, 32, 32000),
    "1.5B, 32 heads on 4 kv": MODELS["llama-1.5b"],
}


@dataclass(frozen=True)
class Row:
    """What one model took: medians of CPU seconds and peak MiB by stage, ``failure`` when there is no measurement."""

    name: str
    subject: str
    shape: Shape
    cpu: Mapping[str, float]
    wall: Mapping[str, float]
    peak: float = 0.0
    imported: float = 0.0
    facts: Mapping[str, Any] | None = None
    failure: str = ""

    def seconds(self, *stages: str) -> float:
        """CPU seconds of several stages together."""
        return sum(self.cpu.get(stage, 0.0) for stage in stages)


def ask(subject: str, shape: Shape, device: str, limit: float) -> dict[str, Any] | str:
    """One measurement in a process of its own; a sentence when it fails."""
    request = json.dumps({"subject": subject, "shape": asdict(shape), "device": device})
    path = os.pathsep.join(str(ROOT / part) for part in ("", "passes", "backends", "tools"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "measure.py"), request]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return last[0]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def combine(name: str, subject: str, shape: Shape, answers: Sequence[dict[str, Any] | str]) -> Row:
    """The medians of repeated measurements; the first failure when one failed."""
    good = [a for a in answers if not isinstance(a, str)]
    if len(good) < len(answers):
        return Row(name, subject, shape, {}, {}, failure=next(a for a in answers if isinstance(a, str)))

    def medians(what: str) -> dict[str, float]:
        return {s: statistics.median(a["stages"][s][what] for a in good) for s in good[0]["stages"]}

    facts = {k: v for k, v in good[0].items() if k not in ("stages", "imported", "built")}
    imported = statistics.median(a["imported"] for a in good)
    return Row(name, subject, shape, medians("cpu"), medians("wall"), max(medians("peak").values()), imported, facts)


class Runner:
    """Runs the measurements one after the other under a progress bar."""

    def __init__(self, progress: Progress, limit: float) -> None:
        self.progress = progress
        self.limit = limit

    def pairs(
        self, title: str, shapes: Mapping[str, Shape], subjects: Sequence[str], repeats: int, device: str = "meta"
    ) -> list[Row]:
        """Rows of each subject for each shape; subjects alternate within a repeat, and a failed one is not repeated."""
        rows = []
        task = self.progress.add_task(title, total=len(shapes) * len(subjects) * repeats)
        for name, shape in shapes.items():
            answers: dict[str, list[dict[str, Any] | str]] = {subject: [] for subject in subjects}
            for turn in range(repeats):
                for subject in subjects:
                    past = answers[subject]
                    if not (turn >= 1 and name in ONCE) and not any(isinstance(a, str) for a in past):
                        past.append(ask(subject, shape, device, self.limit))
                    self.progress.advance(task)
            rows += [combine(name, subject, shape, answers[subject]) for subject in subjects]
        return rows


def by_subject(rows: Sequence[Row], name: str) -> dict[str, Row]:
    """The rows of one model."""
    return {row.subject: row for row in rows if row.name == name}


Cells = list[list[str]]


def road_table(rows: Sequence[Row]) -> Cells:
    """One line a model: seconds by stage, ratios to the bare export, peak memory."""
    cells = [["model", "parameters", "nodes", "torch.export", *STAGES, "trace / export", "rest / export", "peak MiB"]]
    for name in dict.fromkeys(row.name for row in rows):
        found = by_subject(rows, name)
        bare, ours = found["export"], found["shear-ir"]
        if bare.failure or ours.failure:
            cells.append([name, ours.failure or bare.failure, *[""] * (len(cells[0]) - 2)])
            continue
        facts = ours.facts or {}
        export = bare.cpu["export"]
        cells.append([
            name, amount(facts["parameters"]), str(facts["nodes"]), f"{export:.2f}",
            f"{ours.cpu['trace']:.2f}", *(f"{ours.cpu[s]:.3f}" for s in STAGES[1:]),
            f"{ours.cpu['trace'] / export:.2f}", f"{ours.seconds(*STAGES[1:]) / export:.2f}",
            f"{ours.peak:.0f} ({ours.peak - ours.imported:+.0f})",
        ])  # fmt: skip
    return cells


def rival_table(rows: Sequence[Row]) -> Cells:
    """One line a model: shear-ir and torch-pruning from the model to groups, and for one step of pruning."""
    cells = [[
        "model, weights on the CPU", "to groups: ours", "theirs", "ratio", "prune: ours", "theirs", "ratio",
        "removed: ours", "theirs",
    ]]  # fmt: skip
    for name in dict.fromkeys(row.name for row in rows):
        found = by_subject(rows, name)
        ours, theirs = found["shear-ir"], found["torch-pruning"]
        if ours.failure:
            cells.append([name, ours.failure, *[""] * 7])
            continue
        groups, prune = ours.seconds("trace", "axes", "groups"), ours.seconds("plan", "rewrite", "cut")
        mine = f"{(ours.facts or {})['removed']:.1%}"
        if theirs.failure:
            cells.append([name, f"{groups:.2f}", theirs.failure, "", f"{prune:.2f}", "", "", mine, ""])
            continue
        facts = theirs.facts or {}
        their_groups, their_prune = theirs.seconds("trace", "groups"), theirs.seconds("step")
        cells.append([
            name, f"{groups:.2f}", f"{their_groups:.2f}", f"{groups / their_groups:.2f}",
            f"{prune:.2f}", f"{their_prune:.2f}", f"{prune / their_prune:.2f}",
            mine, f"{facts['removed']:.1%}" + ("" if facts["runs"] else ", does not run"),
        ])  # fmt: skip
    return cells


def amount(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def show(title: str, cells: Cells) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for place, head in enumerate(cells[0]):
        table.add_column(head, justify="left" if place == 0 else "right")
    for line in cells[1:]:
        table.add_row(*line)
    console.print(table)
    console.print()


def markdown(title: str, cells: Cells) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    rule = "|---|" + "---:|" * (len(cells[0]) - 1)
    return "\n".join([f"**{title}**", "", lines[0], rule, *lines[1:], ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds over the number of layers, both logarithmic, with a straight line beside them."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    kinds = {
        "torch.export": ("export", ("export",)),
        "trace": ("shear-ir", ("trace",)),
        "axes + groups": ("shear-ir", ("axes", "groups")),
        "plan": ("shear-ir", ("plan",)),
        "rewrite + check + cut": ("shear-ir", ("rewrite", "check", "cut")),
    }
    for label, (subject, stages) in kinds.items():
        points = [(row.shape.layers, row.seconds(*stages)) for row in rows if row.subject == subject and row.cpu]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    ends = [rows[0].shape.layers, rows[-1].shape.layers]
    axes.plot(ends, [0.004 * n for n in ends], color="grey", linestyle=":", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="layers", ylabel="CPU seconds")
    axes.set_xticks(
        sorted({row.shape.layers for row in rows}), [str(n) for n in sorted({r.shape.layers for r in rows})]
    )
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def conditions(repeats: int, load: tuple[float, float]) -> dict[str, Any]:
    """What a reader has to know to compare with other numbers."""
    versions = {}
    for name in ("torch", "transformers", "torch-pruning"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions, "repeats": repeats, "load_before": load[0], "load_after": load[1],
    }  # fmt: skip


def sentence(about: Mapping[str, Any]) -> str:
    """The conditions in words."""
    used = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"Medians of {about['repeats']} ({', '.join(ONCE)}: one) in CPU seconds, one thread; {about['machine']}, "
        f"Python {about['python']}, {used}; load average {about['load_before']:.1f} before and "
        f"{about['load_after']:.1f} after."
    )


def load_average() -> float:
    """How many processes want a core, over the last minute."""
    return os.getloadavg()[0]


def main(
    sizes: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(MODELS)}; all by default.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements per model, of which the median counts.")] = 3,
    quick: Annotated[bool, typer.Option(help="Tiny models and one repeat.")] = False,
    only: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(PARTS)}; all by default.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds after which one measurement is given up.")] = 240.0,
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md and layers.svg.")] = HERE / "out",
) -> None:
    """Measure, print tables, write them to a folder; parts that an earlier run left there stay."""
    chosen = [name for name in sizes.split(",") if name] or (["tiny"] if quick else list(MODELS))
    parts = [name for name in only.split(",") if name] or list(PARTS)
    unknown = [name for name in chosen if name not in MODELS] + [part for part in parts if part not in PARTS]
    if unknown:
        console.print(f"there is no {unknown[0]}; there are {', '.join((*MODELS, *PARTS))}", style="red")
        raise typer.Exit(2)
    few = 2 if quick else None
    shapes = {
        "models": {name: MODELS[name] for name in chosen},
        "layers": {f"{n} layers": Shape(2048, 5632, n, 32, 4, 32000) for n in LAYERS[:few]},
        "widths": {f"hidden {n}": Shape(n, 11 * n // 4, 8, 16, 4, 32000) for n in WIDTHS[:few]},
        "rivals": dict(list(RIVALS.items())[:few]),
    }
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        before = load_average()
        with Progress(console=console, transient=True) as progress:
            subjects = ("shear-ir", "torch-pruning") if part == "rivals" else ("export", "shear-ir")
            device = "cpu" if part == "rivals" else "meta"
            rows = Runner(progress, limit).pairs(part, shapes[part], subjects, 1 if quick else repeats, device)
        about = conditions(1 if quick else repeats, (before, load_average()))
        show(PARTS[part], table_of(part, rows))
        console.print(sentence(about), "\n", soft_wrap=True)
        if part == "layers":
            plot(rows, out / "layers.svg")
        write(out, part, {"conditions": about, "rows": [asdict(row) for row in rows]}, table_of(part, rows))
    console.print(f"written to {out}")


def table_of(part: str, rows: Sequence[Row]) -> Cells:
    """The table of one part."""
    return rival_table(rows) if part == "rivals" else road_table(rows)


def write(out: Path, part: str, measured: dict[str, Any], cells: Cells) -> None:
    """Put one part into results.json and results.md beside those that are there."""
    file = out / "results.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[part] = {
        **measured,
        "markdown": markdown(PARTS[part], cells) + "\n" + sentence(measured["conditions"]) + "\n",
    }
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    texts = [known[name]["markdown"] for name in PARTS if name in known]
    (out / "results.md").write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
