"""shear-ir: a compiler that makes transformers physically smaller.

>>> import shear_ir as sir
>>> program = sir.trace(model)                                  # doctest: +SKIP
>>> plan = sir.plan(program, ratio=0.2, importance="magnitude") # doctest: +SKIP
>>> small = sir.shear(model, plan)                              # doctest: +SKIP

The package is the IR. This file alone knows what stands above it: it is the face that users import, and it looks up
each name where it is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shear_ir.errors import LoadError as LoadError
    from shear_ir.errors import PlanError as PlanError
    from shear_ir.errors import SaveError as SaveError
    from shear_ir.errors import ShearError as ShearError
    from shear_ir.errors import ShearingError as ShearingError
    from shear_ir.errors import TraceError as TraceError
    from shear_ir.errors import UnsoundError as UnsoundError
    from shear_ir.frontend.adapter_files import load_adapter as load_adapter
    from shear_ir.frontend.base import base_digest as base_digest
    from shear_ir.manager import Analysis as Analysis
    from shear_ir.manager import AnalysisManager as AnalysisManager
    from shear_ir.manager import PassManager as PassManager
    from shear_ir.manager import Rewrite as Rewrite
    from shear_ir.plans import Plan as Plan
    from shear_ir.program import Program as Program
    from shear_tools.api.pipeline import analyses as analyses
    from shear_tools.api.pipeline import dependency_graph as dependency_graph
    from shear_tools.api.pipeline import explain as explain
    from shear_tools.api.pipeline import groups as groups
    from shear_tools.api.pipeline import load as load
    from shear_tools.api.pipeline import project as project
    from shear_tools.api.pipeline import save as save
    from shear_tools.api.pipeline import shear as shear
    from shear_tools.api.pipeline import trace as trace
    from shear_tools.api.pipeline import verify as verify
    from shear_tools.api.planning import plan as plan
    from shear_tools.api.planning import scores as scores
    from shear_tools.api.repairing import repair as repair
    from shear_tools.api.repairing import rotate as rotate
    from shear_tools.api.repairing import with_biases as with_biases
    from shear_tools.api.repairing import with_rms_norms as with_rms_norms
    from shear_tools.workflow.run import lorashear as lorashear
    from shear_training.callback import LHSPGCallback as LHSPGCallback
    from shear_training.lhspg import LHSPG as LHSPG
    from shear_training.schedule import Periods as Periods

__version__ = "0.1.0"

# Names are imported when they are asked for: the command line must start without torch.
_HOMES = {
    "LHSPG": "shear_training.lhspg",
    "Periods": "shear_training.schedule",
    "LHSPGCallback": "shear_training.callback",
    "lorashear": "shear_tools.workflow.run",
    "trace": "shear_tools.api.pipeline",
    "groups": "shear_tools.api.pipeline",
    "explain": "shear_tools.api.pipeline",
    "shear": "shear_tools.api.pipeline",
    "verify": "shear_tools.api.pipeline",
    "save": "shear_tools.api.pipeline",
    "load": "shear_tools.api.pipeline",
    "project": "shear_tools.api.pipeline",
    "analyses": "shear_tools.api.pipeline",
    "dependency_graph": "shear_tools.api.pipeline",
    "plan": "shear_tools.api.planning",
    "scores": "shear_tools.api.planning",
    "repair": "shear_tools.api.repairing",
    "rotate": "shear_tools.api.repairing",
    "with_biases": "shear_tools.api.repairing",
    "with_rms_norms": "shear_tools.api.repairing",
    "load_adapter": "shear_ir.frontend.adapter_files",
    "base_digest": "shear_ir.frontend.base",
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
