"""What decides that modules compute the sheared program, over transformers' architectures: docs/coverage/proof.md.

    python tools/bench/proof.py                       # all of them; about half an hour on two cores
    python tools/bench/proof.py --only 'causal/*'     # goes on where it was; --again measures anew
    python tools/bench/proof.py --table               # the table of what is there, nothing is run
    python tools/bench/proof.py --stock               # cut so that stock classes load it: docs/coverage/stock.md

Every architecture is built tiny and random, cut in channels and heads by the module backend, in float32 and in
bfloat16, and compared with the masked original by numbers; proof by structure is asked for each. Many a class has no
number in its config for heads that are fewer than the hidden size says: ``--stock`` cuts each by the default plan
instead, or by ffn, experts or heads alone, whichever comes first that a config can say, and asks structure alone.
Each runs in a process of its own, and its answer is kept as a file.
"""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for part in ("tools", "backends", "passes", "."):
    sys.path.insert(0, str(ROOT / part))

Answer = Mapping[str, Any]
console = Console()


KINDS: tuple[dict[str, Any], ...] = ({}, {"kinds": ("ffn",)}, {"kinds": ("expert",)}, {"kinds": ("kv_head",)})
"""What is asked for so that a stock class can load what is left: all that the default takes, then one kind."""


def stages(name: str, numbers: bool = True, stock: bool = False) -> Iterator[dict[str, Any]]:
    """The answer about one architecture, as it grows; ``done`` says that there is no more.

    ``numbers``: compare with the masked original too, in both precisions; structure alone needs neither. ``stock``: cut
    what leaves a stock model, see ``KINDS``.
    """
    import torch

    from bench import coverage_one

    answer: dict[str, Any] = {"name": name}
    try:
        answer["class"] = coverage_one.class_of(name).__name__
        model, refusal = coverage_one.build(name)
        if refusal:
            raise coverage_one.NotBuilt(refusal)
        yield answer
        for dtype in (torch.float32, torch.bfloat16) if numbers and not stock else (torch.float32,):
            made = _cut_stock(model) if stock else _cut(model.to(dtype), numbers)
            answer[str(dtype).removeprefix("torch.")] = made
            yield answer
    except Exception as failure:  # what the table has to say of it
        answer["failure"] = coverage_one.line(failure)
    yield answer | {"done": True}


def _cut_stock(model: Any) -> dict[str, Any]:
    """Cut ``model`` by the first plan of ``KINDS`` that leaves a stock model."""
    import shear_ir as sir
    from bench.coverage_one import line
    from shear_backends.module.stock import Stock

    refused = ""  # the first of the reasons: it is about all that may go
    try:
        program = sir.trace(model)
        found = sir.groups(program)
        stock = Stock(model, found)
        for kinds in KINDS:
            try:
                plan = sir.plan(program, ratio=0.2, **kinds)
            except sir.PlanError as failure:
                refused = refused or line(failure)
                continue
            why = stock.why_not({found.by_name[cut.group]: len(cut.kept) for cut in plan.cuts})
            if why:
                refused = refused or f"no config says what is left: {why}"
                continue
            record: Any = sir.shear(model, plan).shear_record
            if record.stock:
                cut = sorted({found.by_name[cut.group].kind for cut in plan.cuts})
                return {"stock": True, "structure": record.proof.equal, "lengths": record.proof.lengths,
                        "why": record.proof.why, "kinds": cut}  # fmt: skip
            refused = refused or "the config says what is left, and the class computes something else"
    except sir.ShearError as failure:
        refused = line(failure)
    return {"refused": refused}


def _cut(model: Any, numbers: bool) -> dict[str, Any]:
    """Cut ``model`` by the module backend; what decided, and what numbers say."""
    import shear_ir as sir
    from bench.coverage_one import COLUMNS, able, line, units
    from shear_passes.analysis.cost import MeasureCosts
    from shear_passes.rewrite.cuts import build_plan

    try:
        program = sir.trace(model)
        found = sir.groups(program)
        kept: dict[Any, Any] = {}
        for kinds in COLUMNS.values():
            first = next((k for k in kinds if any(g.kind == k and able(g) for g in found)), None)
            kept |= {g: units(g) for g in found if g.kind == first and able(g)}
        if not kept:
            return {"refused": "nothing to cut"}
        plan = build_plan(found, sir.analyses(program).get(MeasureCosts()), kept)
        small = sir.shear(model, plan)
        record: Any = small.shear_record
        made = {"stock": record.stock, "structure": record.proof.equal, "lengths": record.proof.lengths}
        made["why"] = record.proof.why
        if not numbers:
            return made
        report: Any = sir.verify(model, small, plan)
        return made | {"sound": report.sound, "gap": report.gap, "noise": report.noise, "bound": report.bound,
                       "moved": report.moved}  # fmt: skip
    except sir.ShearError as failure:
        return {"refused": line(failure)}


def answer_to(name: str, memory: int, pipe: Any, numbers: bool = True, stock: bool = False) -> None:
    """Send what is known of ``name`` after every stage."""
    from bench import coverage_one

    coverage_one._limits(memory)
    start = time.process_time()
    for answer in stages(name, numbers, stock):
        pipe.send(answer | {"seconds": time.process_time() - start})
    pipe.close()


def markdown(answers: Sequence[Answer], versions: Mapping[str, str], total: int) -> str:
    """The page: the counts, then a row for each architecture."""
    from bench.coverage import table

    cut = [a for a in answers if "structure" in a.get("float32", {})]
    structure = [a for a in cut if a["float32"]["structure"]]
    stock = [a for a in cut if a["float32"]["stock"]]
    both = [a[d] for a in answers for d in ("float32", "bfloat16") if "sound" in a.get(d, {})]
    alarms = [a["name"] for a in answers for d in ("float32", "bfloat16") if a.get(d, {}).get("sound") is False]
    said = ", ".join(f"{k} {v}" for k, v in versions.items())
    lines = [
        "# What decides that modules compute the sheared program",
        "",
        f"Made by `tools/bench/proof.py` ({said}); every model tiny and random, a quarter of the channels and of the",
        "experts and half of the heads cut by the module backend. Structure: the program of the modules is the sheared",
        "one, call by call, at the lengths of the column. Where it is not, numbers decided, for the reason beside it.",
        "Sound: by numbers, against the masked original, in float64.",
        "",
        f"- {len(answers)} of {total} architectures were tried, {len(cut)} cut by modules",
        f"- decided by structure: {len(structure)}; of the {len(stock)} stock ones:"
        f" {sum(1 for a in stock if a['float32']['structure'])}",
        f"- compared by numbers in float32 and bfloat16: {len(both)} models, {len(alarms)} of them called unsound"
        + (f": {', '.join(alarms)}" if alarms else ""),
        "",
    ]
    header = ("architecture", "class", "decided by", "lengths", "stock", "sound fp32", "sound bf16", "why not")
    return "\n".join([*lines, *table(header, [_row(a) for a in answers]), ""])


def stock_markdown(answers: Sequence[Answer], versions: Mapping[str, str], total: int) -> str:
    """The page of ``--stock``: the counts, then a row for each architecture."""
    from bench.coverage import table

    stock = [a for a in answers if a.get("float32", {}).get("stock")]
    said = ", ".join(f"{k} {v}" for k, v in versions.items())
    lines = [
        "# What decides where a stock class loads the result",
        "",
        f"Made by `tools/bench/proof.py --stock` ({said}); every model tiny and random, cut by the default plan of",
        "a fifth of its parameters or, where no config of the class says what that leaves, by ffn, experts or heads",
        "alone.",
        "",
        f"- {len(answers)} of {total} architectures were tried, {len(stock)} of them are stock in one of these cuts",
        f"- decided by structure: {sum(1 for a in stock if a['float32']['structure'])} of these {len(stock)}",
        "",
    ]
    header = ("architecture", "class", "decided by", "lengths", "cut", "why not")
    rows = [[r[0], r[1], r[2], r[3], ", ".join(a.get("float32", {}).get("kinds", ())), r[7]]
            for a in answers for r in [_row(a)]]  # fmt: skip
    return "\n".join([*lines, *table(header, rows), ""])


def _row(answer: Answer) -> list[str]:
    single, half = answer.get("float32", {}), answer.get("bfloat16", {})
    why = answer.get("failure") or single.get("refused") or single.get("why", "")
    if half.get("refused") and not single.get("refused"):
        why = "; ".join(filter(None, (why, f"in bf16: {half['refused']}")))
    decided = "" if "structure" not in single else "structure" if single["structure"] else "numbers"
    lengths = ", ".join("x".join(map(str, shape)) for shape in single.get("lengths", ()))
    marks = {True: "✓", False: "**no**", None: ""}
    return [
        answer["name"],
        str(answer.get("class", "")),
        decided,
        lengths,
        "✓" if single.get("stock") else "",
        marks[single.get("sound")],
        marks[half.get("sound")],
        str(why),
    ]


def main(
    out: Annotated[Path, typer.Option(help="Where the answers are kept, one file each.")] = HERE / "out" / "proof",
    docs: Annotated[Path, typer.Option(help="Where proof.md goes.")] = ROOT / "docs" / "coverage",
    only: Annotated[list[str] | None, typer.Option(help="Globs on task/type.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 2,
    limit: Annotated[float, typer.Option(help="Seconds for each.")] = 150.0,
    memory: Annotated[int, typer.Option(help="GiB for each.")] = 6,
    again: Annotated[bool, typer.Option("--again", help="Measure finished ones anew.")] = False,
    numbers: Annotated[bool, typer.Option(help="Compare by numbers, too, in both precisions.")] = True,
    stock: Annotated[bool, typer.Option("--stock", help="Cut what leaves stock models; writes stock.md.")] = False,
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
) -> None:
    """Measure what is missing, then write the table."""
    from bench import coverage_one, proof
    from bench.coverage import Store, prepare, run_all

    prepare()
    everything = coverage_one.names()
    chosen = [n for n in everything if not only or any(fnmatch.fnmatch(n, glob) for glob in only)]
    store = Store(out / "stock" if stock else out)
    missing = [] if only_table else [n for n in chosen if again or store.get(n) is None]
    try:
        for answer in run_all(missing, jobs, limit, memory, partial(proof.answer_to, numbers=numbers, stock=stock)):
            store.put(answer)
            console.print(" ".join(_row(answer)), markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print("stopped: what is done is kept, and the next call goes on from there")
        raise typer.Exit(130) from None
    answers: list[Answer] = [kept for n in everything if (kept := store.get(n)) is not None]
    docs.mkdir(parents=True, exist_ok=True)
    page = (stock_markdown if stock else markdown)(answers, store.versions, len(everything))
    (docs / ("stock.md" if stock else "proof.md")).write_text(page, encoding="utf-8")
    console.print("\n".join(page.splitlines()[:12]), markup=False)


if __name__ == "__main__":
    typer.run(main)
