"""The loss of a language model on rows of tokens: forward only, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from shear_ir.errors import PlanError
from shear_ir.training.data import Progress, Source
from shear_ir.training.rows import IGNORED, Rows


@dataclass(frozen=True)
class Loss:
    """``nll``: mean negative log-likelihood in nats per token, NaN where the model gives NaN; ``tokens``: predicted."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``e**nll``, infinite where that is too large for a float."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def evaluate(
    model: nn.Module,
    rows: Rows,
    *,
    batch: int = 8,
    bf16: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Loss:
    """The loss of ``model``, any causal language model, on ``rows``, where it is and in evaluation mode.

    ``bf16``: compute in bfloat16 by autocast; the loss itself is in float32 and summed in float64. Weights, mode and
    cache settings are as before when it returns. Raises ``PlanError`` when no token of ``rows`` counts.
    """
    if not bool(rows.counted[:, 1:].any()):
        raise PlanError("the rows hold no token to predict, so there is no loss to measure")
    total, tokens = 0.0, 0
    device = _device(model)
    with _measuring(model), torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        for start in range(0, len(rows), batch):
            nll, count = _batch_loss(model, rows.batch(slice(start, start + batch)), device)
            total, tokens = total + nll, tokens + count
            if progress is not None:
                progress(min(start + batch, len(rows)), len(rows))
    return Loss(total / tokens, tokens)


def evaluate_sources(
    model: nn.Module,
    sources: Mapping[str, Source | Rows],
    *,
    batch: int = 8,
    bf16: bool = False,
    progress: Progress | None = None,
) -> dict[str, Loss]:
    """The loss of ``model`` on the validation rows of each source."""
    found = {}
    for name, source in sources.items():
        rows = source if isinstance(source, Rows) else source.validation
        each = None if progress is None else _named(progress, f"measuring {name}")
        found[name] = evaluate(model, rows, batch=batch, bf16=bf16, progress=each)
    return found


def _batch_loss(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> tuple[float, int]:
    labels = batch.pop("labels")[:, 1:]
    feed = {name: tensor.to(device) for name, tensor in batch.items()}
    output = model(**feed)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    counts = int((labels != IGNORED).sum())
    # Row by row: the logits of a large vocabulary take more memory in float32 than the rest of the model.
    nll = [
        cross_entropy(row[:-1].float(), wanted.to(row.device), ignore_index=IGNORED, reduction="none").double().sum()
        for row, wanted in zip(logits, labels, strict=True)
    ]
    return float(torch.stack(nll).sum()), counts


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no cache; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        if cached:
            config.use_cache = cached
        for module in training:
            module.training = True


def _device(model: nn.Module) -> torch.device:
    """Where the inputs go: to the embedding, for a model may lie on several devices."""
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in (embedding, model):
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            return parameter.device
    return torch.device("cpu")


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
