"""Example inputs, made from the forward signature and the config, with sizes that equal no size of the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shear_ir.errors import TraceError

Inputs = dict[str, Tensor]

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


def example_inputs(model: nn.Module, *, batch: int | None = None, length: int | None = None, seed: int = 0) -> Inputs:
    """Inputs by forward-argument name, on the model's device.

    Token ids have shape ``(batch, length)``, pixel values ``(batch, channels, height, width)``. Sizes not given are
    primes that equal no dim of the model. Raises ``TraceError`` when the signature does not say what to make.
    """
    batch, length = _free_sizes(model, batch, length)
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        made = _transformers_inputs(model, config, batch, length, generator)
    else:
        made = _module_inputs(model, batch, length, generator)
    return {name: value.to(device) for name, value in made.items()}


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def as_inputs(model: nn.Module, inputs: Any) -> Inputs:
    """Inputs given as a mapping, a tensor or a sequence, as a mapping by forward-argument name."""
    if isinstance(inputs, Mapping):
        return {str(name): value for name, value in inputs.items() if isinstance(value, Tensor)}
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    names = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(values) > len(names):
        raise TraceError(f"{type(model).__name__}.forward takes {len(names)} inputs, but {len(values)} were given")
    return dict(zip(names, values, strict=False))


def _free_sizes(model: nn.Module, batch: int | None, length: int | None) -> tuple[int, int]:
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    config = getattr(model, "config", None)
    if config is not None:
        sizes = set(_ints(config.to_dict()))
        taken |= sizes | {a // b for a in sizes for b in sizes if b and a % b == 0}
    free = [prime for prime in _PRIMES if prime not in taken] or list(_PRIMES)
    batch = batch or free[0]
    return batch, length or next((p for p in free if p > max(batch, 6)), free[-1])


def _ints(values: Mapping[str, Any]) -> Iterable[int]:
    for value in values.values():
        if isinstance(value, Mapping):
            yield from _ints(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield value


def _transformers_inputs(model: nn.Module, config: Any, batch: int, length: int, generator: torch.Generator) -> Inputs:
    names = set(inspect.signature(_innermost(model).forward).parameters)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    main = str(model.main_input_name)
    if main == "inputs" and "pixel_values" in names:  # of any kind, and images are one of them
        main = "pixel_values"
    made: Inputs = {}
    if main == "pixel_values":
        made[main] = _pixels(config, batch, generator, _float_dtype(model))
    else:
        vocab = int(getattr(text, "vocab_size", None) or _embedding_rows(model))
        made[main] = torch.randint(0, vocab, (batch * _rows(model, config, main), length), generator=generator)
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = torch.randint(0, vocab, (batch, length + 2), generator=generator)
        # A padding id among random ids would mask positions; ones say that every position is real.
        if "attention_mask" in names and getattr(config, "is_encoder_decoder", False):
            made["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    return made


def _rows(model: nn.Module, config: Any, name: str) -> int:
    """Rows of ``name`` for each of the batch, such as one a codebook, as the docstring of forward gives its shape."""
    said = re.search(rf"\b{name} \([^)]*of shape `\(batch_size \* (\w+),", _innermost(model).forward.__doc__ or "")
    rows = getattr(config, said[1], 1) if said else 1
    return rows if isinstance(rows, int) else 1


def _innermost(model: nn.Module) -> nn.Module:
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def _embedding_rows(model: nn.Module) -> int:
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not rows:
        raise TraceError(f"no vocabulary size found for {type(model).__name__}: pass inputs={{name: tensor}} to trace")
    return max(rows)


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _pixels(config: Any, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    size = getattr(config, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = int(getattr(config, "num_channels", None) or 3)
    return torch.randn(batch, channels, int(height), int(width), generator=generator).to(dtype)


def _module_inputs(model: nn.Module, batch: int, length: int, generator: torch.Generator) -> Inputs:
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    readers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    first = next((m for m in model.modules() if isinstance(m, readers)), None)
    if len(required) != 1 or first is None:
        raise TraceError(
            f"the inputs of {type(model).__name__}.forward cannot be guessed from its signature: "
            "pass inputs={name: tensor} to trace"
        )
    dtype = _float_dtype(model)
    if isinstance(first, nn.Embedding):
        value = torch.randint(0, first.num_embeddings, (batch, length), generator=generator)
    elif isinstance(first, nn.Linear):
        value = torch.randn(batch, length, first.in_features, generator=generator).to(dtype)
    else:
        spatial = [37 - 4 * i for i in range(len(first.kernel_size))]
        value = torch.randn(batch, first.in_channels, *spatial, generator=generator).to(dtype)
    return {required[0].name: value}
