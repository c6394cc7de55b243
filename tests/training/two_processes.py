"""One LHSPG run under accelerate; every process takes its rows of the same global batch. Started by the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from shear_training.schedule import Periods
from tests.training.tiny import adapted, lhspg, tokens


def main(out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    raw = adapted(targets=("q_proj", "v_proj", "up_proj"))
    inside = lhspg(raw, {"ffn0": 20, "ffn1": 20, "kv1": 1}, Periods(warmup=3, count=3, steps=4))
    model, optimizer = accelerator.prepare(raw, inside)
    for number in range(16):
        batch = tokens(8, 13).roll(number, 1)
        each = len(batch) // accelerator.num_processes
        mine = batch[accelerator.process_index * each :][:each]
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    total = torch.stack([p.detach().double().sum() for p in raw.parameters()]).sum()
    totals = accelerator.gather(total.reshape(1))
    if accelerator.is_main_process:
        assert torch.equal(totals, totals[0].expand_as(totals)), "the processes have different weights"
        zero = (~inside.units.nonzero()).nonzero().flatten().tolist()  # type: ignore[union-attr]
        out.write_text(json.dumps({"zero": zero, "processes": accelerator.num_processes}))
    # The last reference to the process group must not be DDP's, which lets it go with the interpreter locked: gloo's
    # threads then wait for the lock, and their end is waited for.
    accelerator.free_memory(model, optimizer)
    del model, optimizer
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
