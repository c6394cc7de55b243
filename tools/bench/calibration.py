"""What calibration costs: memory that stays between batches, and time, over the number of rows it looks at.

    python tools/bench/calibration.py [--rows 16,64,256] [--criteria flap,taylor]

On the bundled language model. Memory: bytes of all tensors that are alive between two batches and were not before the
pass; the most of any batch. Python's own objects are measured by tracemalloc. Each row has 256 tokens.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shear_ir as sir

MODEL = Path(__file__).parents[1] / "assets" / "tiny-llama"
CRITERIA = (
    "flap",
    "wanda",
    "minitron",
    "taylor",
    "taylor-mixed",
    "lora-guided",
    "mini-llm{directions=2}",
    "bonsai{masks=4}",
)
LENGTH, BATCH = 256, 8


@dataclass
class Held:
    """Tensors and Python objects that are alive between batches, in bytes, beyond those there were at first."""

    before: int = field(default_factory=lambda: tensor_bytes())
    tensors: int = 0
    objects: int = 0

    def look(self) -> None:
        """Called between two batches."""
        self.tensors = max(self.tensors, tensor_bytes() - self.before)
        self.objects = max(self.objects, tracemalloc.get_traced_memory()[0])


def tensor_bytes() -> int:
    """Bytes of all storages that some tensor holds."""
    gc.collect()
    # Of these types alone: the fake tensors of a trace have no memory.
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def stream(rows: int, vocabulary: int, held: Held) -> Iterator[dict[str, Tensor]]:
    """Random rows, made one batch at a time."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(0, rows, BATCH):
        held.look()
        yield {"input_ids": torch.randint(3, vocabulary, (min(BATCH, rows), LENGTH), generator=draw)}


def measured(model: nn.Module, program: Any, name: str, rows: int) -> tuple[Held, float]:
    """What one criterion held, and the seconds of one thread that it took."""
    held = Held()
    tracemalloc.start()
    started = time.process_time()
    config: Any = model.config
    sir.scores(program, name, data=stream(rows, config.vocab_size, held))
    tracemalloc.stop()
    return held, time.process_time() - started


def main() -> None:
    """Prints a table in Markdown."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rows", default="16,64,256")
    asked.add_argument("--criteria", default=",".join(CRITERIA))
    given = asked.parse_args()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    model.eval()
    program = sir.trace(model)
    counts = [int(n) for n in given.rows.split(",")]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(f"weights: {weights:.1f} MiB\n")
    print("| criterion | " + " | ".join(f"tensors MiB, {n} rows" for n in counts) + " | objects KiB | seconds a row |")
    print("|---|" + "---:|" * (len(counts) + 2))
    for name in given.criteria.split(","):
        found = [measured(model, program, name, n) for n in counts]
        tensors = " | ".join(f"{held.tensors / 2**20:.2f}" for held, _ in found)
        held, seconds = found[-1]
        print(f"| {name} | {tensors} | {held.objects / 2**10:.0f} | {seconds / counts[-1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
