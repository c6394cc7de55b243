"""The main job on a real model: SmolLM2-135M-Instruct pruned, checked, saved and read back, and what that takes.

    python tools/bench/real.py                                  # 16 runs, resumable: some half an hour on two cores
    python tools/bench/real.py --ratio 0.2 --how magnitude      # a part

At each ratio by magnitude and by FLAP with least squares, from fp32 and from bf16, by the command that users type in a
process of its own; then stock transformers reads the result and writes some tokens with it. Memory is the peak resident
set above that of the imports alone, as a multiple of the checkpoint. Writes real.md.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
RATIOS = (0.1, 0.2, 0.3, 0.5)
DTYPES = {"fp32": "smollm2", "bf16": "smollm2-bf16"}
"""Precision to the model that tools/fetch_models makes."""
HOW = {"magnitude": ["--importance", "magnitude"], "flap": ["--importance", "flap", "--repair", "least-squares"]}
SAMPLES = 32
IMPORTS = (
    "import torch, torch.export, transformers.models.llama.modeling_llama, shear_tools.cli.app, shear_tools.cli.prune, "
    "shear_tools.api.pipeline, shear_tools.api.planning, shear_tools.api.repairing, shear_backends.verify.numbers, "
    "shear_backends.store.model"
)
READ_BACK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
fed = tokenizer("The largest animals in the sea are", return_tensors="pt")
made = model.generate(**fed, max_new_tokens=8, do_sample=False)
assert made.shape[1] > fed["input_ids"].shape[1]
print(repr(tokenizer.decode(made[0, fed["input_ids"].shape[1]:])))
"""
console = Console(stderr=True)


def measured(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a process to its end: its exit status, seconds, peak resident set in bytes, and what it wrote to stdout.

    What is measured is one process alone: this one holds no torch, whose size the other would inherit.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    started = time.perf_counter()
    with log.with_suffix(".out").open("w+") as out, log.open("w") as err:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        said = out.read()
    unit = 1 if sys.platform == "darwin" else 1024
    return {"exit": process.returncode, "seconds": seconds, "peak": used.ru_maxrss * unit, "said": said}


def run(dense: Path, data: Path, ratio: float, how: str, folder: Path) -> dict[str, Any]:
    """One cell: prune, and read back what it wrote."""
    small = folder / "small"
    more = ["--data", str(data), "--samples", str(SAMPLES)] if how == "flap" else []
    command = ["prune", str(dense), "--ratio", f"{ratio:g}", *HOW[how], *more, "-o", str(small), "--json"]
    done = measured(["-m", "shear_tools", *command], folder / "prune.log")
    told = json.loads(done.pop("said")) if done["exit"] == 0 else {}
    found = {
        **done, "checkpoint": sum(file.stat().st_size for file in dense.glob("*.safetensors")),
        "ratio": told.get("ratio"), "verified": told.get("verified"), "stock": told.get("stock"),
        "steps": told.get("seconds"), "error": (folder / "prune.log").read_text().strip()[-500:], "writes": None,
    }  # fmt: skip
    if done["exit"] == 0:
        again = measured(["-c", READ_BACK, str(small)], folder / "read.log")
        found["writes"] = again["said"].strip() if again["exit"] == 0 else None
        shutil.rmtree(small)
    return found


def line(name: tuple[str, float, str], found: Mapping[str, Any], imports: int) -> str:
    """A row of the table."""
    dtype, ratio, how = name
    checked = found["verified"] or {}
    numbers = [f"{checked[key]:.2g}" if key in checked else "–" for key in ("gap", "noise", "bound")]
    memory = (found["peak"] - imports) / found["checkpoint"]
    cells = [
        dtype, f"{ratio:g}", how, str(found["exit"]), "yes" if found["stock"] else "no",
        "yes" if found["writes"] else "no", str(checked.get("judge", "–")), *numbers, f"{memory:.1f}",
        f"{found['seconds']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def markdown(
    cells: Mapping[tuple[str, float, str], Mapping[str, Any]], imports: Mapping[str, int], samples: int = SAMPLES
) -> str:
    """The table for people."""
    lines = [
        "# SmolLM2-135M-Instruct, pruned by the default command", "",
        f"`python tools/bench/real.py` made this page; flap stands for FLAP on {samples} rows with least squares. gap: "
        "how far the result is from the masked original in float64, noise: how far that is from itself in the model's "
        f"own precision, bound: what rounding explains. Memory: peak above the imports ("
        f"{', '.join(f'{how}: {size / 1e6:.0f} MB' for how, size in imports.items())}), in checkpoints.", "",
        "| weights | ratio | how | exit | stock | generates | judge | gap | noise | bound | memory | seconds |",
        "|---|---:|---|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [line(name, found, imports[name[2]]) for name, found in cells.items()]
    refused = [f"- {d} {r:g} {h}: {f['error'].splitlines()[-1]}" for (d, r, h), f in cells.items() if f["exit"]]
    lines += ["", *refused] if refused else []
    return "\n".join([*lines, "", f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={_threads()}.", ""])


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "unset")


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable.", show_default="0.1 0.2 0.3 0.5")] = None,
    how: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="magnitude flap")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="fp32 bf16")] = None,
    out: Annotated[Path, typer.Option(help="Where results and finished parts go.")] = ROOT / "out" / "real",
) -> None:
    """Run all cells and write the table; cells that are done are not done again."""
    wanted = [(d, r, h) for d in dtype or DTYPES for r in ratio or RATIOS for h in how or HOW]
    out.mkdir(parents=True, exist_ok=True)
    data = _fetched("make_texts", "make()")
    models = {d: _fetched("fetch_models", f"fetch({DTYPES[d]!r})") for d in {d for d, _, _ in wanted}}
    # Files of rows are read by a library of its own, where there are any.
    imports = {
        how: measured(["-c", IMPORTS + (", datasets" if how == "flap" else "")], out / "imports.log")["peak"]
        for how in dict.fromkeys(how for _, _, how in wanted)
    }
    cells = {}
    for d, r, h in wanted:
        folder = out / f"{d}-{r:g}-{h}"
        folder.mkdir(exist_ok=True)
        file = folder / "run.json"
        if not file.is_file():
            console.print(f"{folder.name} …")
            file.write_text(json.dumps(run(models[d], data, r, h, folder), indent=1))
        cells[d, r, h] = json.loads(file.read_text())
    text = markdown(cells, imports)
    (out / "real.md").write_text(text)
    print(text)


def _fetched(module: str, call: str) -> Path:
    """What a tool made, in a process of its own: making it takes torch."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import {module} as tool; print(tool.{call})"
    return Path(
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    )


if __name__ == "__main__":
    typer.run(main)
