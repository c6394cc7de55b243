"""shear-ir: a compiler that makes transformers physically smaller.

>>> import shear_ir as sir
>>> program = sir.trace(model)                                  # doctest: +SKIP
>>> plan = sir.plan(program, ratio=0.2, importance="magnitude") # doctest: +SKIP
>>> small = sir.shear(model, plan)                              # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Names are imported when they are asked for: the command line must start without torch.
_HOMES = {
    "lorashear": "shear_ir.workflow.run",
    "trace": "shear_ir.pipeline",
    "groups": "shear_ir.pipeline",
    "explain": "shear_ir.pipeline",
    "plan": "shear_ir.planning",
    "scores": "shear_ir.planning",
    "shear": "shear_ir.pipeline",
    "repair": "shear_ir.repairing",
    "rotate": "shear_ir.repairing",
    "with_biases": "shear_ir.repairing",
    "with_rms_norms": "shear_ir.repairing",
    "verify": "shear_ir.pipeline",
    "save": "shear_ir.pipeline",
    "load": "shear_ir.pipeline",
    "project": "shear_ir.pipeline",
    "load_adapter": "shear_ir.frontend.adapter_files",
    "base_digest": "shear_ir.frontend.base",
    "analyses": "shear_ir.pipeline",
    "Plan": "shear_ir.plans",
    "Program": "shear_ir.program",
    "Analysis": "shear_ir.manager",
    "AnalysisManager": "shear_ir.manager",
    "PassManager": "shear_ir.manager",
    "Rewrite": "shear_ir.manager",
    "ShearError": "shear_ir.errors",
    "TraceError": "shear_ir.errors",
    "LoadError": "shear_ir.errors",
    "PlanError": "shear_ir.errors",
    "ShearingError": "shear_ir.errors",
    "UnsoundError": "shear_ir.errors",
    "SaveError": "shear_ir.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shear_ir' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
