"""Calibration: one pass of a model over batches of data, watched by any number of observers at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shear_ir.errors import PlanError, ShearError
from shear_ir.frontend import feeds
from shear_ir.frontend.feeds import tensors_in, with_tensors
from shear_ir.frontend.inputs import Inputs, as_inputs, device_of
from shear_ir.frontend.sentences import sentence
from shear_ir.frontend.unchanged import unchanged
from shear_ir.manager import Analysis, AnalysisManager
from shear_ir.program import Program

LossFunction = Callable[[Any, Inputs], Tensor]
"""The loss of one batch, given what the model returned and what it was fed: a scalar, the mean over what counts."""

Progress = Callable[[int, int | None], None]
"""Called with the number of batches done, and how many there are where that is known."""

Portion = Literal["whole", "rows", "any"]
"""What an observer is shown at a time: batches as they come, single rows, or whichever others ask for."""

IGNORED = -100
"""The label of what the loss does not count."""


class Observer:
    """Watches a calibration: hooks that are on during each batch, and a look at the loss after it.

    ``needs_loss`` and ``backward``: what must be computed. What it finds must not depend on who else watches, so it
    says in ``portion`` what it is to be shown: ``any`` only where sums over rows are those over batches.
    """

    needs_loss = False
    backward = False

    def portion(self, calibration: Calibration) -> Portion:
        """What it is shown at a time."""
        return "any"

    def attach(self, calibration: Calibration) -> AbstractContextManager[Any]:
        """Hooks that watch; they come off at the end."""
        return nullcontext()

    def after(self, step: CalibrationStep) -> None:
        """Called after each batch."""

    def finish(self) -> Any:
        """The result, once all batches were seen."""


@dataclass(eq=False)
class Calibration:
    """A model and the data that it is watched on.

    ``batches``: mappings of forward arguments, or tensors for the first one; an iterator can be read once.
    ``loss``: of one batch; when None, the model's own: ``outputs.loss``, a scalar output, or for a causal language
    model the loss of the next token.

    ``whole``: whether an observer may look at any operator, so that none is left out.

    Of the portion at hand: ``masks``, which tokens are no padding, each of shape ``(rows, length)``; ``rows``;
    ``weight``, what its loss is the mean over: tokens to be predicted, labels, or rows where that is not known.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: LossFunction | None = None
    progress: Progress | None = None
    watching: bool = field(default=True, init=False)
    takers: dict[nn.Parameter, list[Callable[[Tensor], None]]] = field(default_factory=dict, init=False)
    whole: bool = field(default=False, init=False)
    masks: tuple[Tensor, ...] = field(default=(), init=False)
    rows: int = field(default=0, init=False)
    weight: int = field(default=0, init=False)

    def run(self, observers: Sequence[Observer]) -> None:
        """One pass over the batches with all of ``observers`` at once; nothing of a batch outlives it.

        Those that ask for rows and those that ask for whole batches each get a forward pass of their own. Weights,
        modes, gradients and cache settings are as before when it returns. Raises ``PlanError`` when there is no batch,
        or no loss where one is needed.
        """
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        seen = 0
        with unchanged(self.model), _as_it_was(self.model), ExitStack() as hooks:
            parts = self._parts(observers)
            for view, watching, _ in parts:
                hooks.callback(view.takers.clear)
                for observer in watching:
                    hooks.enter_context(observer.attach(view))
            for parameter in dict.fromkeys(p for view, _, _ in parts for p in view.takers):
                hooks.callback(_hand_over(parameter, [view for view, _, _ in parts]).remove)
            for number, batch in enumerate(self.batches, start=1):
                feed = as_feed(self.model, batch)
                for view, watching, by_rows in parts:
                    view._watch_alone([other for other, _, _ in parts])
                    seen += view._show(feed, watching, by_rows)
                if self.progress is not None:
                    self.progress(number, total)
        if not seen:
            raise PlanError("the calibration data has no batch; an iterator can be read only once: give a list")

    @property
    def knows_weights(self) -> bool:
        """Whether it is known what the loss is the mean over; what a loss of the user's own averages is not."""
        return self.loss is None

    def on_gradient(self, parameter: nn.Parameter, take: Callable[[Tensor], None]) -> None:
        """Call ``take`` with the gradient of ``parameter`` after each backward pass; then the gradient is dropped."""
        parameter.requires_grad_(True)
        self.takers.setdefault(parameter, []).append(take)

    def _parts(self, observers: Sequence[Observer]) -> list[tuple[Calibration, list[Observer], bool]]:
        """Views of this data, each with its observers and whether it shows single rows."""
        asked = [(observer, observer.portion(self)) for observer in observers]
        by_rows = any(portion == "rows" for _, portion in asked)
        rows = [o for o, portion in asked if portion == "rows" or (by_rows and portion == "any")]
        whole = [o for o, _ in asked if o not in rows]
        found = [(rows, True), (whole, False)]
        return [(Calibration(self.model, (), self.loss), each, single) for each, single in found if each]

    def _watch_alone(self, views: Sequence[Calibration]) -> None:
        """Only the observers of this one of ``views`` see what follows, and only their parameters take gradients."""
        for view in views:
            view.watching = view is self
            for parameter in view.takers:
                parameter.requires_grad_(parameter in self.takers)

    def _show(self, feed: Inputs, observers: Sequence[Observer], by_rows: bool) -> int:
        """Show a batch, whole or row by row; the number of portions."""
        portions = list(_single(feed)) if by_rows else [feed]
        weights = [self._weight(each) for each in portions]
        for each, self.weight in zip(portions, weights, strict=True):
            # A row without anything to predict adds nothing to the mean of its batch; its own would be 0 / 0.
            self._step(each, observers, loses=self.weight > 0 or not any(weights))
        return len(portions)

    def _weight(self, feed: Inputs) -> int:
        return counted(self.model, feed) if self.knows_weights else _rows(feed)

    def _step(self, feed: Inputs, observers: Sequence[Observer], loses: bool) -> None:
        backward = loses and any(o.backward for o in observers)
        self.masks = _masks(self.model, feed)
        self.rows = _rows(feed)
        step = CalibrationStep(self, feed)
        with torch.set_grad_enabled(backward):
            if backward or (loses and any(o.needs_loss for o in observers)):
                step.loss = loss_of(self.model, feed, self.loss)
                if bool(step.loss.isnan()):
                    raise PlanError(
                        "the loss of a batch of the calibration data is not a number: no token of it is to be "
                        "predicted (rows of one token, all of it padding), or the model's own numbers overflow"
                    )
            else:
                with nullcontext(False) if self.whole else _headless(self.model) as causal:
                    call(self.model, {k: v for k, v in feed.items() if k != "labels"} if causal else feed)
            if backward:
                assert step.loss is not None
                step.loss.backward()  # type: ignore[no-untyped-call]
                step.loss = step.loss.detach()
        for observer in observers:
            observer.after(step)


@dataclass(eq=False)
class CalibrationStep:
    """One batch while its observers look at it: what was fed and what it lost."""

    calibration: Calibration
    feed: Inputs
    loss: Tensor | None = None

    @property
    def weight(self) -> int:
        """What the loss is the mean over; means over all data weigh each portion by it."""
        return self.calibration.weight

    def again(self) -> float:
        """The loss of the same batch by a forward pass that nobody watches, without gradients."""
        made = self.calibration
        made.watching = False
        try:
            with torch.no_grad():
                return float(loss_of(made.model, self.feed, made.loss))
        finally:
            made.watching = True


@dataclass(frozen=True)
class Data(Analysis[Calibration]):
    """The calibration that criteria read. It is handed in: ``manager.put(Data(), Calibration(model, batches))``."""

    def run(self, program: Program, analyses: AnalysisManager) -> Calibration:
        """Raises ``PlanError``: nobody handed any data in."""
        raise PlanError("this criterion looks at data: pass data=batches (--data FILE), or importance='magnitude'")


def as_feed(model: nn.Module, batch: Any) -> Inputs:
    """``batch`` as forward arguments by name, on the device of the model's first parameter."""
    names = _arguments(model)
    if isinstance(batch, Mapping):
        # Other columns, such as texts, are no arguments; switches and numbers may be.
        feed = {str(k): v for k, v in batch.items() if k in names or tensors_in({"": v})}
    elif isinstance(batch, Tensor) or len(names) > 1:
        values = [batch] if isinstance(batch, Tensor) else list(batch)
        main = getattr(model, "main_input_name", None)
        names = [main, *(n for n in names if n != main)] if main in names else names
        feed = dict(zip(names, values, strict=False))
    else:
        feed = as_inputs(model, batch)
    if not any(t.dim() for t in tensors_in(feed).values()):
        raise PlanError(f"a batch of the calibration data is a {type(batch).__name__} without any tensor in it")
    device = _device(model)
    return with_tensors(feed, lambda tensor: tensor.to(device))


def call(model: nn.Module, feed: Inputs) -> Any:
    """The outputs of ``model``; labels that it does not take are left out. Raises ``PlanError`` where it fails."""
    names = _arguments(model)
    try:
        return feeds.call(model, {name: value for name, value in feed.items() if name != "labels" or "labels" in names})
    except (ShearError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever the model raises, it is these inputs that it does not take
        raise PlanError(
            f"{type(model).__name__} does not run on the calibration data: {sentence(failure)}"
        ) from failure


@contextmanager
def _headless(model: nn.Module) -> Iterator[bool]:
    """Within it, a causal language model makes no logits, which are larger than all else; whether that is so.

    Its head is called all the same, so that hooks see what it reads.
    """
    find = getattr(model, "get_output_embeddings", None)
    # Only one that may leave logits out makes nothing else of them.
    last = _is_causal(model) and "logits_to_keep" in _arguments(model)
    head = find() if callable(find) and last else None
    if not isinstance(head, nn.Linear) or head._forward_hooks or "forward" in vars(head):
        yield False
        return
    vars(head)["forward"] = lambda read: read[..., :1]
    try:
        yield True
    finally:
        del vars(head)["forward"]


def loss_of(model: nn.Module, feed: Inputs, loss: LossFunction | None = None) -> Tensor:
    """The mean loss of one batch, a scalar; raises ``PlanError`` when the model does not say what it loses."""
    labels = _labels(model, feed)
    if loss is None and labels is not None:
        feed = {**feed, "labels": labels}
    outputs = call(model, feed)
    made = loss(outputs, feed) if loss is not None else _own_loss(outputs)
    if not isinstance(made, Tensor) or made.numel() != 1:
        raise PlanError(
            f"this criterion needs a loss, and {type(model).__name__} gives none: put labels into the batches, or pass "
            "a function of outputs and batch"
        )
    return made.reshape(())


def counted(model: nn.Module, feed: Inputs) -> int:
    """What the model's own loss of a batch is the mean over: labels that count, rows where it has none."""
    labels = _labels(model, feed)
    if labels is None or not labels.dim() or labels.is_floating_point():
        return _rows(feed)
    # The first token is predicted from nothing.
    labels = labels[..., 1:] if _is_causal(model) else labels
    return int((labels != IGNORED).sum())


def _labels(model: nn.Module, feed: Inputs) -> Tensor | None:
    """The labels of a batch; its own tokens for a causal language model that is given none."""
    given: Tensor | None = feed.get("labels")
    if given is not None or not _is_causal(model) or "input_ids" not in feed:
        return given
    ids: Tensor = feed["input_ids"]
    mask = feed.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)


def _rows(feed: Inputs) -> int:
    return min(len(t) for t in tensors_in(feed).values() if t.dim())


def _single(feed: Inputs) -> Iterator[Inputs]:
    """The rows of a batch as batches of one."""
    for start in range(_rows(feed)):
        yield with_tensors(feed, partial(_row, start))


def _row(place: int, tensor: Tensor) -> Tensor:
    return tensor[place : place + 1] if tensor.dim() else tensor


def _own_loss(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _is_causal(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or not callable(can_generate):
        return False
    return bool(can_generate()) and "labels" in _arguments(model)


def _arguments(model: nn.Module) -> list[str]:
    """Names of the arguments of forward; those of its base for a model with adapters."""
    base = getattr(model, "get_base_model", None)
    return list(inspect.signature((base() if callable(base) else model).forward).parameters)


def _masks(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """Which tokens are no padding: one mask of shape ``(rows, length)`` for every sequence that has padding."""
    masks = [t for n, t in tensors_in(feed).items() if n.endswith("attention_mask") and t.dim() == 2]
    found = tuple(m.bool() for m in masks if not bool(m.all()))
    if found and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PlanError("padded batches of an encoder with a decoder cannot be told apart: give rows without padding")
    return found


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a cache; modes, gradients and what asks for gradients come back."""
    training = [module for module in model.modules() if module.training]
    grads = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False
    for parameter in grads:
        parameter.grad = None
        # Only what an observer asks for is differentiated.
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached
        for module in training:
            module.training = True
        for parameter, (wanted, grad) in grads.items():
            parameter.requires_grad_(wanted)
            parameter.grad = grad


def _hand_over(parameter: nn.Parameter, views: Sequence[Calibration]) -> Any:
    def hand_over(tensor: Tensor) -> None:
        grad, tensor.grad = tensor.grad, None
        assert grad is not None
        for take in (take for view in views if view.watching for take in view.takers.get(parameter, ())):
            take(grad.detach())

    return parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]


def _device(model: nn.Module) -> torch.device:
    """Where the inputs go: to the embedding, for a model may lie on several devices."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except NotImplementedError:
        embedding = None
    found = device_of(embedding) if isinstance(embedding, nn.Module) and list(embedding.parameters()) else None
    found = device_of(model) if found is None or found.type == "meta" else found
    if found.type != "meta":
        return found
    # accelerate has put the weights away, and says where it brings them back to.
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")
