"""Tensors of their own for parameters that are tied: the same function, which may then change in one place alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from shear_backends.graph.module import named_tensors
from shear_ir.frontend.unchanged import copied
from shear_ir.paths import last, parent


def untied(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, int]:
    """A copy of ``model`` in which a tied parameter of ``names`` is one tensor in embeddings, and another elsewhere.

    Its config says so too, and stock classes load it. The number says how many parameters there are more.
    """
    small = copied(model)
    own = named_tensors(small)
    added = 0
    for name in names:
        twins = [twin for twin, tensor in own.items() if tensor is own[name]]
        places = [(small.get_submodule(parent(twin)), last(twin)) for twin in twins]
        readers = [(module, leaf) for module, leaf in places if not isinstance(module, nn.Embedding)]
        if len(readers) == len(places):  # no embedding among them: the first keeps the tensor
            readers = readers[1:]
        if not readers:
            continue
        new = nn.Parameter(own[name].detach().clone(), own[name].requires_grad)
        added += new.numel()
        for module, leaf in readers:
            setattr(module, leaf, new)
    if added:
        _say(small)
    return small, added


def _say(model: nn.Module) -> None:
    """Let the config, and what the model's class noted when it tied, be true."""
    config: Any = getattr(model, "config", None)
    own = named_tensors(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for each in (config, text):
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False
    for module in model.modules():
        tied = vars(module).get("all_tied_weights_keys")
        if isinstance(tied, dict):
            still = {a: b for a, b in tied.items() if own.get(a) is own.get(b)}
            vars(module)["all_tied_weights_keys"] = still
