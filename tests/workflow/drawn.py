"""What a run has found, made up: one group frozen, one whose loss is no number."""

from __future__ import annotations

import math

import shear_ir as sir
from shear_training.knowledge import Knowledge, Sensitivity
from tests.zoo import build

_MODEL = build("llama_gqa")
_PROGRAM = sir.trace(_MODEL)
PLAN = sir.plan(_PROGRAM, ratio=0.3, frozen=("ffn0",))
KNOWLEDGE = Knowledge(
    _PROGRAM.digest, 3.0, (0.25, 0.5), 0.25,
    tuple(
        Sensitivity(g.name, g.kind, g.module, g.size, deviations, g.name == "ffn0")
        for g, deviations in zip(
            [g for g in sir.groups(_PROGRAM) if g.kind in ("ffn", "kv_head")],
            [(0.1, 0.3), (0.5, 2.5), (-0.1, 0.0), (0.2, math.inf)], strict=True,
        )
    ),
)  # fmt: skip
