"""Other projects' pruners on the bundled model, with the settings that suit it best."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

SETTINGS = (
    "torch-pruning's BasePruner with group reduction mean. Its search for what belongs to a key projection does not "
    "end on the rotary embeddings of this transformers (stopped after 60 s for one layer), so it gets the channels of "
    "the feed-forward layers, and attention, embedding and head are left out; one ratio for all layers, bisected until "
    "the share of the parameters is the one asked for. Taylor and activation see the rows that our criteria see. "
    "Beside it shear-ir with the same: those channels alone, every layer alike, no repair."
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
    if best[0] > 0.02:
        raise ValueError(f"out of reach: {best[2]:.2f} is the most")
    return best[1], best[2]


def _once(model: Any, name: str, share: float, batches: Sequence[Mapping[str, Any]]) -> tuple[Any, float]:
    import torch_pruning as tp

    made = copy.deepcopy(model).requires_grad_(True)
    made.config.use_cache = False  # it traces gradients, which a cache has none of
    importance = _importance(tp, made, name, batches)
    channels = [module for path, module in made.named_modules() if path.endswith(("gate_proj", "up_proj"))]
    pruner = tp.pruner.BasePruner(
        made, {"input_ids": batches[0]["input_ids"][:1, :16]}, importance=importance, pruning_ratio=share,
        ignored_layers=[m for m in made.modules() if isinstance(m, torch.nn.Linear) and m not in channels],
        output_transform=lambda outputs: outputs.logits,
    )  # fmt: skip
    pruner.step()
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
            (model(**{**batch, "labels": batch["input_ids"]}).loss / len(batches)).backward()
        return tp.importance.GroupTaylorImportance(group_reduction="mean")
    scored = tp.importance.ActivationImportance(group_reduction="mean")
    # It remembers the last forward pass alone, so all rows go in one.
    with scored.compute_importance(model), torch.no_grad():
        length = min(batch["input_ids"].shape[1] for batch in batches)
        model(input_ids=torch.cat([batch["input_ids"][:, :length] for batch in batches]))
    return scored
