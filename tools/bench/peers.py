"""Other projects' pruners on the bundled model, with the settings that suit it best."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

SETTINGS = (
    "torch-pruning's BasePruner, set up as by its own example for language models: the heads of q, k and v are named, "
    "whole heads go and no head dims, group reduction mean. Embedding and head are left out, so that channels and "
    "heads go and the residual stream stays, as with us; one ratio for both, bisected until the share of the "
    "parameters is the one asked for. Taylor and activation see the rows that our criteria see."
)


def pruned(model: Any, name: str, ratio: float, batches: Sequence[Mapping[str, Any]]) -> tuple[Any, float]:
    """A pruned copy and the share of its parameters that is gone; raises what torch-pruning raises."""
    low, high = 0.0, 1.0
    best: tuple[float, Any, float] | None = None
    for _ in range(7):
        middle = (low + high) / 2
        made, really = _once(model, name, middle, batches)
        if best is None or abs(really - ratio) < best[0]:
            best = abs(really - ratio), made, really
        low, high = (middle, high) if really < ratio else (low, middle)
    assert best is not None
    return best[1], best[2]


def _once(model: Any, name: str, share: float, batches: Sequence[Mapping[str, Any]]) -> tuple[Any, float]:
    import torch_pruning as tp

    made = copy.deepcopy(model)
    importance = _importance(tp, made, name, batches)
    config, heads = made.config, {}
    for path, module in made.named_modules():
        if path.endswith("q_proj"):
            heads[module] = config.num_attention_heads
        elif path.endswith(("k_proj", "v_proj")):
            heads[module] = config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        made, {"input_ids": batches[0]["input_ids"][:1, :16]}, importance=importance, pruning_ratio=share,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=share,
        ignored_layers=[made.get_submodule("lm_head"), made.get_submodule("model.embed_tokens")],
    )  # fmt: skip
    pruner.step()
    for path, module in made.named_modules():
        if path.endswith("self_attn"):
            module.num_key_value_groups = pruner.num_heads[module.q_proj] // pruner.num_heads[module.k_proj]
    made.zero_grad()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, made))
    made(input_ids=batches[0]["input_ids"][:1])
    return made, 1 - after / before


def _importance(tp: Any, model: Any, name: str, batches: Sequence[Mapping[str, Any]]) -> Any:
    if name == "magnitude":
        return tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    if name == "taylor":
        model.zero_grad()
        for batch in batches:
            (model(**batch, labels=batch["input_ids"]).loss / len(batches)).backward()
        return tp.importance.GroupTaylorImportance(group_reduction="mean")
    scored = tp.importance.ActivationImportance(group_reduction="mean")
    # It remembers the last forward pass alone, so all rows go in one.
    with scored.compute_importance(model), torch.no_grad():
        model(input_ids=torch.cat([batch["input_ids"] for batch in batches]))
    return scored
