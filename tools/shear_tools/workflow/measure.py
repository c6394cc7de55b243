"""What a model does in practice: tokens per second, forward and generating, and a sample of its text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Medians over ``ROUNDS`` runs. ``forward``: tokens per second of one batch; ``generate``: new tokens per second
    of greedy generation with the cache, 0 where the model does not generate."""

    forward: float
    generate: float


def compare_speed(models: Sequence[nn.Module], ids: Tensor, new_tokens: int = 32) -> list[Speed]:
    """The speed of each model on ``ids``, int64 of shape ``(batch, length)``, measured in turns against each other."""
    # Generation begins with half of the rows' length, so that the new tokens have room behind it.
    start = ids[:, : max(1, ids.shape[1] // 2)]
    new_tokens = min(_room(model, start.shape[1], new_tokens) for model in models)
    forward: list[list[float]] = [[] for _ in models]
    generate: list[list[float]] = [[] for _ in models]
    for number in range(ROUNDS + 1):  # the first run warms up
        for place, model in enumerate(models):
            seconds = _seconds(model, lambda model=model: _forward(model, ids))
            made = _seconds(model, lambda model=model: _generated(model, start, new_tokens))
            if number:
                forward[place].append(ids.numel() / seconds)
                generate[place].append(len(ids) * new_tokens / made if hasattr(model, "generate") else 0.0)
    return [Speed(statistics.median(f), statistics.median(g)) for f, g in zip(forward, generate, strict=True)]


def sample(model: nn.Module, tokenizer: Any, prompt: Sequence[int], new_tokens: int = 48) -> str:
    """What the model writes after the tokens ``prompt``, greedily; empty where it does not generate."""
    if not hasattr(model, "generate"):
        return ""
    made = _generated(model, torch.tensor([list(prompt)]), _room(model, len(prompt), new_tokens))
    return str(tokenizer.decode(made[0, len(prompt) :].tolist(), skip_special_tokens=True))


def _forward(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids.to(_device(model)))


def _room(model: nn.Module, length: int, new_tokens: int) -> int:
    """How many of ``new_tokens`` the model has positions for after ``length`` tokens."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return max(0, min(new_tokens, positions - length)) if isinstance(positions, int) and positions > 0 else new_tokens


def _generated(model: nn.Module, start: Tensor, new_tokens: int) -> Tensor:
    if not hasattr(model, "generate") or not new_tokens:
        return start
    start = start.to(_device(model))
    with torch.no_grad():
        return model.generate(  # type: ignore[no-any-return, operator]
            start, attention_mask=torch.ones_like(start), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip


def _seconds(model: nn.Module, work: Any) -> float:
    device = _device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
