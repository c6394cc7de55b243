"""Two processes that measure one model together. Started by the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from shear_training.evaluate import evaluate_sources
from shear_training.rounds import processes
from tests.training.recovering import small, sources


def main(out: Path) -> None:
    state = processes("cpu")
    model = small()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(state.process_index))
    found = evaluate_sources(model, sources(), batch=2, state=state)
    patience = None
    if state.num_processes > 1:
        group = torch.distributed.group.WORLD
        patience = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[union-attr]
    told = {name: [loss.nll, loss.tokens] for name, loss in found.items()}
    each = gather_object([{"losses": told, "calls": len(calls)}])
    if state.is_main_process:
        out.write_text(json.dumps({"each": each, "patience": patience}))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
