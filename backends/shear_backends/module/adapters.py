"""LoRA adapters of a sheared base: which of their entries stay, and what PEFT keeps beside their tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from shear_backends.graph.module import named_tensors
from shear_ir.axes import Indices
from shear_ir.errors import ShearingError
from shear_ir.frontend.adapters import Adapter, find_adapters
from shear_ir.frontend.base import base_view
from shear_ir.plans import Kept

_LAYERS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")
# Options of a LoraConfig under which the adapted layer is more than its base and this adapter.
_REFUSED = ("layer_replication", "trainable_token_indices", "ensure_weight_tying", "megatron_config", "use_qalora")


def require_lora(model: nn.Module) -> None:
    """Raise ``ShearingError`` unless every adapter is LoRA or DoRA, which is all whose slices are known here."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for name, config in configs.items():
        require_lora_config(name, config)
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        kind = type(module)
        if (
            not isinstance(module, LoraLayer)
            or kind.__module__ != "peft.tuners.lora.layer"
            or kind.__name__ not in _LAYERS
        ):
            raise ShearingError(
                f"{path} is a {kind.__module__}.{kind.__name__}, and only LoRA adapters of plain layers are sheared"
            )
        for name, variant in module.lora_variant.items():
            if not type(variant).__name__.startswith("Dora"):
                said = type(variant).__name__.removesuffix("Variant")
                raise ShearingError(
                    f"the adapter {name} at {path} is the LoRA variant {said}, and only LoRA and DoRA are sheared"
                )
        if module.merged:
            raise ShearingError(f"the adapter at {path} is merged into its base: call unmerge_adapter() first")


def require_lora_config(name: str, config: Any) -> None:
    """The same, as far as an adapter's config tells."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ShearingError(f"the adapter {name} is of the method {kind}, and only LoRA adapters are sheared")
    for option in _REFUSED:
        if getattr(config, option, None):
            raise ShearingError(f"the adapter {name} uses {option}, and such adapters are not sheared")


def follow(model: nn.Module, kept: Kept) -> dict[str, dict[int, Indices]]:
    """What stays of every tensor of ``model``, active or not, when ``kept`` stays of its base; by the model's names.

    B's rows, the magnitude and B's bias follow the rows of the base weight, A's columns its columns; copies that
    adapters trained (``modules_to_save``) follow their originals. ``kept`` has the base's own names.
    Raises ``ShearingError`` for adapters whose slices are not known.
    """
    names = base_view(model).tensors
    found = {name: dict(dims) for base, dims in kept.items() for name in names.get(base, ())}
    for adapter in find_adapters(model):
        rows, columns = _sides(adapter)
        dims = found.get(adapter.base, {})
        if rows in dims:
            found.setdefault(adapter.b, {})[0] = dims[rows]
            for name in filter(None, (adapter.b_bias, adapter.magnitude)):
                found.setdefault(name, {})[_longest(model.get_parameter(name).shape)] = dims[rows]
        if columns in dims:
            if getattr(adapter.layer.get_base_layer(), "groups", 1) != 1:
                raise ShearingError(
                    f"{adapter.module} adapts a grouped convolution, whose input channels are not sheared"
                )
            found.setdefault(adapter.a, {})[1] = dims[columns]
        if adapter.row_dim is None and adapter.weight.dim() == 3 and 0 in dims:
            _follow_experts(adapter, dims[0], found)
    return found


def merged_kept(model: nn.Module, mine: Kept, plan: Kept) -> dict[str, dict[int, Indices]]:
    """``mine``, which follows the base, and what ``plan`` keeps beyond it; both by the model's names.

    Raises ``ShearingError`` where the two contradict each other.
    """
    known = named_tensors(model)
    found = {name: dict(dims) for name, dims in mine.items()}
    for name, dims in plan.items():
        for dim, indices in dims.items() if name in known else ():
            if not np.array_equal(found.setdefault(name, {}).setdefault(dim, indices), indices):
                raise ShearingError(f"{name} would keep other indices than the base weight that it adapts")
    return found


def settle(model: nn.Module) -> None:
    """Make true what PEFT notes beside the tensors: sizes, ranks and alphas of layers, and the adapters' configs.

    A scaling stays what it was. Raises ``ShearingError`` where no alpha gives it at the new rank.
    """
    found: dict[str, list[_Noted]] = {}
    places = {path: base for base, (path, *_) in base_view(model).modules.items()}
    for adapter in find_adapters(model):
        layer, name = adapter.layer, adapter.name
        a, b = adapter.factors
        layer.in_features, layer.out_features = a.shape[1], b.shape[0]
        experts = _experts(adapter)
        if adapter.row_dim is None:
            layer.num_experts = experts
        rank = a.shape[0] // experts
        layer.lora_alpha[name] = _alpha(adapter, rank)
        layer.r[name] = rank
        for factor in (layer.lora_A, layer.lora_B):
            if name in factor:
                _set_sizes(factor[name])
        key = places[_innermost(adapter)]
        if adapter.row_dim is None:
            key = f"{key}.{layer.parameter_name}"
        found.setdefault(name, []).append(_Noted(key, rank, layer.lora_alpha[name]))
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        _set_patterns(config, found.get(name, []))
        forget_start(config)


def forget_start(config: Any) -> None:
    """Let an adapter's config say nothing of how it started.

    A start such as PiSSA changed the base when the adapter was made; a reader must not change it once more.
    """
    if not hasattr(config, "init_lora_weights"):
        return
    config.init_lora_weights = True
    config.loftq_config = {}
    for options in ("eva_config", "corda_config", "lora_ga_config"):
        if hasattr(config, options):
            setattr(config, options, None)


@dataclass(frozen=True)
class _Noted:
    """One adapted layer: its name in the base, as PEFT matches its patterns against it, its rank and its alpha."""

    key: str
    rank: int
    alpha: float


def _sides(adapter: Adapter) -> tuple[int, int]:
    """The dims of the base weight that B's rows and A's columns follow."""
    if adapter.row_dim is not None and adapter.column_dim is not None:
        return adapter.row_dim, adapter.column_dim
    if adapter.weight.dim() == 2:
        return 0, 1
    turned = bool(getattr(adapter.layer.get_base_layer(), "is_transposed", False))
    return (2, 1) if turned else (1, 2)


def _follow_experts(adapter: Adapter, experts: Indices, found: dict[str, dict[int, Indices]]) -> None:
    """Ranks of stacked experts: A has those of one expert side by side, B those of one rank."""
    total = adapter.weight.shape[0]
    ranks = np.arange(adapter.factors[0].shape[0] // total)
    found.setdefault(adapter.a, {})[0] = (experts[:, None] * len(ranks) + ranks).ravel()
    found.setdefault(adapter.b, {})[1] = (ranks[:, None] * total + experts).ravel()


def _experts(adapter: Adapter) -> int:
    return adapter.weight.shape[0] if adapter.row_dim is None and adapter.weight.dim() == 3 else 1


def _innermost(adapter: Adapter) -> str:
    """The path of the base layer that PEFT wraps, perhaps more than once."""
    path, module = adapter.module, adapter.layer
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        path, module = f"{path}.base_layer", inner
    return path


def _longest(shape: Any) -> int:
    """The dim of a vector that may be stored with dims of size 1 around it."""
    return int(np.argmax(shape))


def _set_sizes(factor: nn.Module) -> None:
    """The sizes that a Linear or a convolution notes beside its weight."""
    out, into = factor.weight.shape[0], factor.weight.shape[1]  # type: ignore[index]
    sizes = {"in_features": into, "out_features": out}
    if not hasattr(factor, "in_features"):
        sizes = {"in_channels": into * factor.groups, "out_channels": out}  # type: ignore[operator]
    for name, size in sizes.items():
        setattr(factor, name, size)


def _alpha(adapter: Adapter, rank: int) -> float:
    """The alpha that gives the adapter's scaling at this rank, to the last bit."""
    rooted = adapter.layer.use_rslora.get(adapter.name, False)
    divisor = math.sqrt(rank) if rooted else rank
    old = adapter.layer.lora_alpha[adapter.name]
    if old / divisor == adapter.scaling:
        return old  # type: ignore[no-any-return]
    near = adapter.scaling * divisor
    for alpha in (near, math.nextafter(near, 0), math.nextafter(near, math.inf), float(round(near))):
        if alpha / divisor == adapter.scaling:
            return int(alpha) if alpha == int(alpha) else alpha
    raise ShearingError(
        f"no alpha gives the adapter {adapter.name} at {adapter.module} its scaling {adapter.scaling!r} "
        f"at rank {rank}: keep another number of ranks"
    )


def _set_patterns(config: Any, layers: list[_Noted]) -> None:
    """Ranks and alphas of a config: as they were where they are still true, and else by the full names of layers."""
    if not layers or all(_told(config, layer) == (layer.rank, layer.alpha) for layer in layers):
        return
    config.r = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    config.lora_alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    config.rank_pattern = {_pattern(la.key): la.rank for la in layers if la.rank != config.r}
    config.alpha_pattern = {_pattern(la.key): la.alpha for la in layers if la.alpha != config.lora_alpha}


def _told(config: Any, layer: _Noted) -> tuple[int, float]:
    """The rank and alpha that PEFT takes from a config for one layer: the first pattern that matches."""
    rank, alpha = config.rank_pattern, config.alpha_pattern
    return (
        next((rank[key] for key in _matching(rank, layer.key)), config.r),
        next((alpha[key] for key in _matching(alpha, layer.key)), config.lora_alpha),
    )


def _matching(patterns: Mapping[str, Any], key: str) -> Iterator[str]:
    # PEFT's rule: a pattern stands for the end of a layer's name, from a dot on.
    return (p for p in patterns if re.match(rf"(.*\.)?({p})$", key))


def _pattern(key: str) -> str:
    return f"^{re.escape(key)}"
