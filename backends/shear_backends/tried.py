"""What both models are asked: two sizes that share no factor, one past every position that a config counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shear_backends.sides import Call
from shear_ir.frontend.export import tensors_of
from shear_ir.frontend.feeds import call, tensors_in, with_tensors
from shear_ir.frontend.inputs import Inputs, as_inputs, device_of, example_inputs


@dataclass(frozen=True)
class Trial:
    """One question. ``must``: whether a model that cannot answer it is at fault, and not the question."""

    name: str
    feed: Inputs
    call: Call
    must: bool = True

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the main input."""
        return tuple(next(iter(tensors_in(self.feed).values())).shape)


def run(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """The tensors a model predicts with, caches off."""
    fixed = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return tensors_of(call(model, feed, **fixed))


def trials(model: nn.Module, inputs: Any, seed: int) -> list[Trial]:
    """The questions for ``model``: with ``inputs``, or a list of them, or those that are made for it."""
    if inputs is not None:
        given = inputs if isinstance(inputs, list) else [inputs]
        return [_asked(_placed(model, as_inputs(model, one))) for one in given]
    return [
        _asked(example_inputs(model, seed=seed)),
        _asked(example_inputs(model, batch=2, length=16, seed=seed + 1)),
    ]


def _asked(feed: Inputs) -> Trial:
    return Trial("x".join(map(str, next(iter(tensors_in(feed).values())).shape)), feed, run)


def _placed(model: nn.Module, feed: Inputs) -> Inputs:
    return with_tensors(feed, lambda tensor: tensor.to(device_of(model)))
