"""The LoRA adapters of a PEFT model: which parameters belong together, and what they add to the base weight."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of one layer: ``base + scaling · B·A``. The fields are parameter names of the whole model.

    ``row_dim`` and ``column_dim``: the dims of the base weight that B's rows (its dim 0) and A's columns (its dim 1)
    follow, 0 and 1 for a Linear, 1 and 0 for a Conv1D and an Embedding; None for weights that stack experts.
    ``variant``: PEFT's name of a computation other than ``base(x) + scaling · B(A(x))``, such as DoRA.
    """

    module: str
    name: str
    layer: Any = field(repr=False)
    base: str
    a: str
    b: str
    scaling: float
    active: bool
    row_dim: int | None
    column_dim: int | None
    bias: str | None = None
    b_bias: str | None = None
    magnitude: str | None = None
    variant: str | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, shapes ``(rank, in, ...)`` and ``(out, rank, ...)``."""
        if self.name in self.layer.lora_embedding_A:
            return self.layer.lora_embedding_A[self.name], self.layer.lora_embedding_B[self.name]
        return self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight

    @property
    def weight(self) -> Tensor:
        """The base weight."""
        if hasattr(self.layer, "get_param"):
            return self.layer.get_param()  # type: ignore[no-any-return]
        return self.layer.get_base_layer().weight  # type: ignore[no-any-return]

    def delta(self) -> Tensor:
        """``scaling · B·A`` in fp32, in the shape and on the device of the base weight; no gradient."""
        a, b = self.factors
        with torch.no_grad():
            if a.dim() != 2 or self.row_dim is None:
                return self.layer.get_delta_weight(self.name).float()  # type: ignore[no-any-return]
            made = self.scaling * (b.float() @ a.float())
            return made if self.row_dim == 0 else made.T


def find_adapters(model: nn.Module) -> list[Adapter]:
    """Every LoRA adapter of ``model``, active or not, in module order; none for a model without PEFT."""
    if "peft" not in sys.modules:  # then nothing of it can be inside
        return []
    from peft.tuners.lora import LoraLayer

    names = {id(p): n for n, p in model.named_parameters()}
    found: list[Adapter] = []
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found += _of_layer(path, module, names)
    return found


def _of_layer(path: str, layer: Any, names: dict[int, str]) -> Iterator[Adapter]:
    base = layer.get_base_layer()
    stacked = hasattr(layer, "get_param")
    weight = layer.get_param() if stacked else base.weight
    embedded = bool(layer.lora_embedding_A)
    turned = embedded or bool(getattr(layer, "fan_in_fan_out", False))
    bias = None if stacked else getattr(base, "bias", None)
    for name in layer.lora_embedding_A if embedded else layer.lora_A:
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A", "lora_B")
        leaf = "" if embedded else ".weight"
        magnitude = layer.lora_magnitude_vector
        variant = layer.lora_variant.get(name)
        yield Adapter(
            module=path,
            name=name,
            layer=layer,
            base=names[id(weight)],
            a=f"{path}.{a}.{name}{leaf}",
            b=f"{path}.{b}.{name}{leaf}",
            scaling=float(layer.scaling[name]),
            active=name in layer.active_adapters and not layer.disable_adapters,
            row_dim=None if stacked else int(turned),
            column_dim=None if stacked else int(not turned),
            bias=None if bias is None else names.get(id(bias)),
            b_bias=f"{path}.{b}.{name}.bias" if not embedded and layer.lora_B[name].bias is not None else None,
            magnitude=f"{path}.lora_magnitude_vector.{name}.weight" if name in magnitude else None,
            variant=None if variant is None else type(variant).__name__.removesuffix("Variant"),
        )
