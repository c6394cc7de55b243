"""Criteria by name: our own, options in braces, entry points of other packages, import paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from shear_ir.errors import PlanError
from shear_ir.frontend.sentences import sentence
from shear_passes.importance.base import Importance
from shear_passes.importance.block_influence import BlockInfluence
from shear_passes.importance.bonsai import Bonsai
from shear_passes.importance.custom import Custom, as_criterion, find
from shear_passes.importance.lora_guided import LoraGuided
from shear_passes.importance.magnitude import Magnitude
from shear_passes.importance.mini_llm import MiniLlm
from shear_passes.importance.order import Order
from shear_passes.importance.random import Random
from shear_passes.importance.reading import Flap, Minitron, Wanda
from shear_passes.importance.reap import Reap
from shear_passes.importance.taylor import Taylor
from shear_passes.spelling import parse_pass, with_options

DEFAULT_WITH_DATA = "flap"
"""The criterion where data is at hand and none is named."""

DEFAULT_WITHOUT_DATA = "magnitude"

HARMLESS = 0.1
"""The share of a language model's parameters that may go by them before it stops making sense."""

ENTRY_POINTS = "shear_ir.importance"

CRITERIA: Mapping[str, Callable[[], Importance]] = {
    "magnitude": Magnitude,
    "magnitude-l1": lambda: Magnitude(p=1),
    "taylor": Taylor,
    "taylor-second": lambda: Taylor(order=2),
    "taylor-mixed": lambda: Taylor(order="mixed"),
    "taylor-vector": lambda: Taylor(vector=True),
    "lora-guided": LoraGuided,
    "wanda": Wanda,
    "flap": Flap,
    "minitron": Minitron,
    "mini-llm": MiniLlm,
    "bonsai": Bonsai,
    "reap": Reap,
    "block-influence": BlockInfluence,
    "random": Random,
    "order": Order,
}
"""What each name stands for."""


def criterion(name: str, seed: int = 0) -> Importance:
    """The criterion of this name: ``wanda``, ``taylor{order=mixed}``, an entry point, or ``package.module:name``.

    ``seed``: for criteria that draw something and are not given a seed of their own. Raises ``PlanError`` listing the
    names there are.
    """
    if seed < 0:
        raise PlanError(f"a seed is a number from 0 up, not {seed}")
    made = _made(name)
    if seed and "seed" in {f.name for f in dataclasses.fields(made)} and "seed=" not in name:
        made = dataclasses.replace(made, **{"seed": seed})
    return made


def imports(name: str) -> bool:
    """Whether the criterion ``name``, or one among its options, may be found by an import path.

    Such a name comes from the command line or from Python, and never from a file: it says which code runs.
    """
    # In quotes, an escape may stand for a colon.
    return ":" in name or "\\" in name or name.partition("{")[0].strip() == Custom.name()


def blind_costs(name: str) -> str:
    """What it costs to prune a language model by the criterion ``name``, which looks at no data."""
    return (
        f"{name} looks at no data: a language model that loses more than {HARMLESS:.0%} of its parameters by it is "
        "ruined until it is trained again, so give data, or recover it before use"
    )


def default(data: Any) -> str:
    """The name of the criterion for a plan with, or without, ``data``."""
    return DEFAULT_WITHOUT_DATA if data is None else DEFAULT_WITH_DATA


def _made(name: str) -> Importance:
    if name in CRITERIA:
        return CRITERIA[name]()
    bare, braces, options = name.partition("{")
    given = _found(bare)
    if given is not None:
        return _with_options(given, name, options) if braces else as_criterion(given, name)
    if braces:
        return _spelled(name)
    own = {point.name for point in entry_points(group=ENTRY_POINTS)}
    known = ", ".join(sorted({*CRITERIA, *own}))
    raise PlanError(f"there is no importance criterion '{name}'; there are {known}, or package.module:name")


def _found(name: str) -> Any:
    """What an entry point or an import path of this name stands for; None where it is neither."""
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return point.load()
        except Exception as failure:  # whatever another package raises when it is imported
            said = sentence(failure)
            raise PlanError(f"the criterion {name} cannot be loaded from its entry point: {said}") from failure
    return find(name) if ":" in name else None


def _with_options(given: Any, name: str, options: str) -> Importance:
    if not (isinstance(given, type) and issubclass(given, Importance)) or not options.endswith("}"):
        raise PlanError(f"{name} is no class of criteria whose fields are its options: write NAME{{option=value}}")
    return with_options(given, options[:-1])


def _spelled(name: str) -> Importance:
    """A criterion with its options, as passes are spelled."""
    made = parse_pass(name)
    if not isinstance(made, Importance):
        raise PlanError(f"{made.name()} is no importance criterion; there are {', '.join(sorted(CRITERIA))}")
    return made
