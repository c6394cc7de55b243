"""What both models are asked: several sizes, one past whatever a config counts, a step with a cache, training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shear_backends.verify import sizes
from shear_backends.verify.sides import Call
from shear_backends.verify.sizes import apart, numbers_of, prime
from shear_ir.frontend.export import output_tensors
from shear_ir.frontend.feeds import call, tensors_in, uncached, with_tensors
from shear_ir.frontend.guards import size_guards
from shear_ir.frontend.inputs import Inputs, as_inputs, device_of, example_inputs

_LONGEST = 512
_GUARDS = 8
"""Conditions that are tried on their other side: forward of images may ask for more of them than tell apart."""
_PRODUCTS = 2**33
"""Weights times positions that a longer input may cost; beyond it, minutes."""


@dataclass(frozen=True)
class Question:
    """One question. ``small``: how the sheared model is asked, where that is another way than ``call``.

    ``further``: it is asked only where the dense model answers it as it should (with a cache, what it says without
    one; in training, the same twice), and a graph, which knows one way, is not asked.
    """

    name: str
    feed: Inputs
    call: Call
    small: Call | None = None
    further: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the main input."""
        return tuple(next(iter(tensors_in(self.feed).values())).shape)


def run(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """The tensors a model predicts with, caches off."""
    return output_tensors(call(model, feed, **uncached(model)))


def trials(model: nn.Module, inputs: Any, seed: int) -> list[Question]:
    """The questions for ``model``: with ``inputs``, or a list of them, or those that are made for it."""
    if inputs is not None:
        given = inputs if isinstance(inputs, list) else [inputs]
        return [_asked(_placed(model, as_inputs(model, one))) for one in given]
    asked = [_asked(example_inputs(model, seed=seed)), _asked(example_inputs(model, batch=2, length=16, seed=seed + 1))]
    feed = asked[0].feed
    return [*asked, *_otherwise(model, feed), *_shortest(model, feed)]


def _otherwise(model: nn.Module, feed: Inputs) -> Iterator[Question]:
    """Other ways to ask."""
    text = feed.get(_text(feed))
    long = isinstance(text, Tensor) and text.dim() == 2 and text.shape[1] > 1
    if long and hasattr(getattr(model, "config", None), "use_cache"):
        yield Question("a step with a cache", feed, run, step_by_step, further=True)
    yield Question("training", feed, in_training, further=True)


def _shortest(model: nn.Module, feed: Inputs) -> Iterator[Question]:
    """One position, for which no trace speaks: it takes sizes for larger ones."""
    one = sizes.of_length(model, feed, 1)
    if one is not None:
        yield Question("one position", one, run, further=True)


def longer(model: nn.Module, tried: tuple[tuple[int, ...], ...], seed: int) -> Iterator[Question]:
    """Inputs past the whole numbers that the model and its config hold, the longest first, and as long as they are.

    One that counts positions, a window or a bucket shows itself only there. Other sizes than were ``tried``, and as far
    as that is quick: what is longer is not tried.
    """
    most = _affordable(model)
    numbers = sorted((n for n in numbers_of(model) if 16 < n < most), reverse=True)
    for length in [length for n in numbers[:8] for length in (prime(n + 1), n)]:
        trial = _asked(example_inputs(model, batch=1, length=length, seed=seed + 2))
        if length in trial.size and trial.size not in tried:
            yield trial


def resized(model: nn.Module, inputs: Any) -> Iterator[Question]:
    """``inputs`` of another batch and length, past the whole numbers of the model, and asked otherwise."""
    feed = _placed(model, as_inputs(model, inputs))
    yield from _otherwise(model, feed)
    # One row alone is the usual way to be asked, and the one that broadcasts.
    yield from (_asked(made) for made in (apart(model, feed), sizes.of_batch(model, feed, 1)) if made is not None)
    yield from map(_asked, itertools.islice(sizes.longer(model, feed, _affordable(model)), 1))
    yield from _shortest(model, feed)


def past_guards(model: nn.Module, tried: Sequence[Inputs]) -> Iterator[tuple[str, list[Question]]]:
    """What forward asks of sizes and all inputs that were ``tried`` meet, each with inputs that do not meet it.

    Nothing where the model itself does not go on without it, as past its last position.
    """
    most = _affordable(model)
    for guard in size_guards(model, tried[0])[:_GUARDS]:
        if all(map(guard.holds, tried)):
            feeds, beyond = sizes.beyond(model, tried[0], guard, most)
            if feeds or beyond:
                yield f"forward asks {guard}, which all of these meet", list(map(_asked, feeds))


def _affordable(model: nn.Module) -> int:
    """As many positions as are quick."""
    return min(_LONGEST, _PRODUCTS // max(1, sum(p.numel() for p in model.parameters())))


def step_by_step(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """What it predicts when it reads all but the last position, and then that with what it has kept."""
    name = _text(feed)
    begun = model(**{**feed, name: feed[name][:, :-1]}, use_cache=True)
    ended = model(**{**feed, name: feed[name][:, -1:]}, past_key_values=begun.past_key_values, use_cache=True)
    return (torch.cat([begun.logits, ended.logits], dim=1),)


def in_training(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """What it predicts while it is trained, but for dropout."""
    with _training(model):
        return run(model, feed)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    owners: list[Any] = [*model.modules(), *({id(c): c for c in _configs(model)}.values())]
    before = [(owner, name, value) for owner in owners for name, value in vars(owner).items() if _drops(owner, name)]
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        for owner, name, _ in before:
            vars(owner)[name] = 0.0
        yield
    finally:
        for owner, name, value in before:
            vars(owner)[name] = value
        for module, mode in modes.items():
            module.training = mode


def _configs(model: nn.Module) -> Iterator[Any]:
    yield from (m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "__dict__"))


def _drops(owner: Any, name: str) -> bool:
    share = isinstance(vars(owner)[name], float)
    return share and ("drop" in name or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)))


def _text(feed: Inputs) -> str:
    """The tokens that are predicted from."""
    return next((name for name in ("decoder_input_ids", "input_ids") if name in feed), "")


def _asked(feed: Inputs) -> Question:
    return Question("x".join(map(str, next(iter(tensors_in(feed).values())).shape)), feed, run)


def _placed(model: nn.Module, feed: Inputs) -> Inputs:
    return with_tensors(feed, lambda tensor: tensor.to(device_of(model)))
