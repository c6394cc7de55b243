"""The loss of a language model on rows of tokens: forward only, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from shear_ir.errors import PlanError
from shear_training.data import Source, SourceProgress
from shear_training.rows import IGNORED, Rows

_PROBED = 8
"""Tokens on which it is tried whether a model is causal."""


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
    state: PartialState | None = None,
) -> Loss:
    """The loss of ``model``, any causal language model, on ``rows``, where it is and in evaluation mode.

    ``bf16``: compute in bfloat16 by autocast; the loss itself is in float32 and summed in float64. Weights, mode and
    cache settings are as before when it returns. ``state``: processes that all measure the same model here: each takes
    its share of the batches, and all have the same number at the end, to the last bit that of one. Raises ``PlanError``
    when no token of ``rows`` counts.
    """
    if not bool(rows.counted[:, 1:].any()):
        raise PlanError("the rows hold no token to predict, so there is no loss to measure")
    found: list[tuple[int, float, int]] = []
    device = _device(model)
    starts = range(0, len(rows), batch)
    mine = starts if state is None else starts[state.process_index :: state.num_processes]
    with _measuring(model), torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        for start in mine:
            found.append((start, *_batch_loss(model, rows.batch(slice(start, start + batch)), device)))
            if progress is not None:
                progress(min(start + batch, len(rows)), len(rows))
    if state is not None and state.num_processes > 1:
        found = sorted(gather_object(found))
    tokens = sum(count for _, _, count in found)
    return Loss(sum(nll for _, nll, _ in found) / tokens, tokens)


def require_readable(model: nn.Module, sources: Mapping[str, Source | Rows]) -> None:
    """Raise ``PlanError`` where ``model`` cannot read rows of ``sources``, or sees the tokens that it is to predict."""
    parts = [s if isinstance(s, Rows) else part for s in sources.values()
             for part in ((s,) if isinstance(s, Rows) else (s.validation, s.train))]  # fmt: skip
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError("this model has an encoder and a decoder: only causal language models can be measured here")
    vocabulary = getattr(config, "vocab_size", None)
    top = max(int(rows.ids.max()) for rows in parts)
    if isinstance(vocabulary, int) and top >= vocabulary:
        raise PlanError(
            f"the tokenizer gives the token {top}, and the model knows {vocabulary}: it is of another model"
        )
    longest = max(int(rows.lengths.max()) for rows in parts)
    try:
        _read(model, torch.zeros(1, longest, dtype=torch.int64))
    except IndexError as failure:  # a table of positions that ends before
        raise PlanError(f"the model cannot read rows of {longest} tokens: give a shorter length") from failure
    _require_causal(model, parts[0])


def _read(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of one row."""
    with _measuring(model):
        output = model(**_fed(model, {"input_ids": ids}, _device(model)))
    return _logits(output)[0]


def require_numbers(losses: Mapping[str, Loss], whose: str) -> None:
    """Raise ``PlanError`` where a loss of the model ``whose`` is not a number, as after steps that were too large."""
    bad = next((name for name, loss in losses.items() if math.isnan(loss.nll)), None)
    if bad is not None:
        raise PlanError(f"the loss of the {whose} model on {bad} is not a number" + (
            "" if whose == "dense" else ": training diverged, and a lower lr may help"))  # fmt: skip


def _fed(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What ``model`` reads of a batch: a graph takes what it was traced with, no more and no less.

    A mask makes no difference to what is counted: padding is on the right, and no causal model looks there.
    """
    if isinstance(model, fx.GraphModule):
        names = [str(node.target) for node in model.graph.find_nodes(op="placeholder")]
        batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        batch = {name: batch[name] for name in names if name in batch}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _logits(output: Any) -> Tensor:
    """Those of a model of transformers, of a graph, which returns a tuple, or of a module that returns nothing else."""
    found = getattr(output, "logits", output)
    logits: Tensor = found[0] if isinstance(found, (tuple, list)) else found
    return logits


def _require_causal(model: nn.Module, rows: Rows) -> None:
    """By what it does: another last token leaves the outputs before it as they were."""
    one = rows.ids[:1, : min(_PROBED, int(rows.lengths[0]))].long()
    other = one.clone()
    other[0, -1] = one[0, 0] if one[0, -1] != one[0, 0] else (one[0, 0] + 1) % 2
    before, after = _read(model, one), _read(model, other)
    change = (before.float() - after.float()).abs()
    rounding = 4 * torch.finfo(before.dtype).eps * float(before.abs().max())
    if float(change[:-1].max()) > max(1e-4 * float(change[-1].max()), rounding):
        raise PlanError("the model sees the tokens that it is to predict: only causal language models can be measured")


def evaluate_sources(
    model: nn.Module,
    sources: Mapping[str, Source | Rows],
    *,
    batch: int = 8,
    bf16: bool = False,
    progress: SourceProgress | None = None,
    state: PartialState | None = None,
) -> dict[str, Loss]:
    """The loss of ``model`` on the validation rows of each source; the options are those of ``evaluate``."""
    found = {}
    for name, source in sources.items():
        rows = source if isinstance(source, Rows) else source.validation
        each = None if progress is None else _named(progress, f"measuring {name}")
        found[name] = evaluate(model, rows, batch=batch, bf16=bf16, progress=each, state=state)
    return found


def _batch_loss(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> tuple[float, int]:
    labels = batch.pop("labels")[:, 1:]
    output = model(**_fed(model, batch, device))
    logits = _logits(output)
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


def _named(progress: SourceProgress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
