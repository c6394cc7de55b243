"""Pipelines as text, as ``str(PassManager(passes))`` writes them: ``select-uniform{ratio=0.2},shear,dead-code``."""

from __future__ import annotations

import functools
import importlib
import pkgutil

import shear_passes
from shear_ir.errors import PlanError
from shear_ir.manager import Pass
from shear_passes.spelling import parse_pass, split_outside


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that ``text`` spells, in order.

    Raises ``PlanError`` for an unknown pass or option, with the names near it, and for a value of the wrong type.
    """
    _loaded()
    parts = [part.strip() for part in split_outside(text, ",")]
    if not all(parts):
        raise PlanError(f"the pipeline '{text}' has an empty place: passes are separated by single commas")
    return [parse_pass(part) for part in parts]


@functools.cache
def _loaded() -> None:
    """Import every module of this package, so that the names of its passes are known."""
    for module in pkgutil.walk_packages(shear_passes.__path__, f"{shear_passes.__name__}."):
        importlib.import_module(module.name)
