"""What a sheared graph was made of: enough to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shear_ir.frontend.base import has_adapters
from shear_ir.frontend.feeds import inputs_of
from shear_ir.plans import Plan


@dataclass(frozen=True, eq=False)
class GraphRecord:
    """``plan``: what was cut; ``config``: the config of the dense model, where a class of transformers has one.

    ``skeleton``: the dense model itself, where none has, without the numbers of its weights. ``feed``: the inputs of
    its trace. ``adapted``: whether adapters are in it.
    """

    plan: Plan
    model_class: str
    config: Any
    skeleton: nn.Module | None
    feed: Mapping[str, Any]
    adapted: bool

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, skeleton: nn.Module | None = None) -> GraphRecord:
        """The record of a graph that ``plan`` made of ``model``."""
        config = getattr(model, "config", None) if skeleton is None else None
        return cls(plan, type(model).__name__, config, skeleton, inputs_of(model), has_adapters(model))

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphRecord:
        """Itself: nothing of it changes."""
        return self
