"""Example inputs, made from the forward signature and the config, with sizes that equal no size of the model."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shear_ir.errors import TraceError

Inputs = dict[str, Any]
"""Arguments of forward by name: tensors, or any nesting of lists, tuples and dicts of them."""

_PLAIN = (bool, int, float, str, type(None))
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
    """Inputs given as a mapping, a tensor or a sequence, as a mapping by forward-argument name.

    A value is a tensor, or any nesting of lists, tuples and dicts of tensors. Numbers and switches that forward takes
    are part of the call. Raises ``TraceError`` for an argument that forward does not have.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    if isinstance(inputs, Mapping):
        return _by_name(model, {str(name): value for name, value in inputs.items()}, parameters)
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if len(values) > len(names) and rest is not None:
        return {**dict(zip(names, values, strict=False)), rest: tuple(values[len(names) :])}
    if len(values) > 1 and len(names) == 1:  # as many as one argument holds
        return {names[0]: inputs}
    if len(values) > len(names):
        raise TraceError(f"{type(model).__name__}.forward takes {len(names)} inputs, but {len(values)} were given")
    return dict(zip(names, values, strict=False))


def _by_name(model: nn.Module, given: Inputs, parameters: list[inspect.Parameter]) -> Inputs:
    """``given`` in the order of the signature, without what neither holds a tensor nor is asked for."""
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    anything = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    for name, value in given.items():
        if name not in known and not anything and _has_tensors(value):
            raise TraceError(
                f"{type(model).__name__}.forward has no argument {name}; it has {', '.join(known) or 'none'}"
            )
    ordered = [*(name for name in known if name in given), *(name for name in given if name not in known)]
    return {
        name: given[name] for name in ordered if _has_tensors(given[name]) or (name in known and _plain(given[name]))
    }


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _plain(value: Any) -> bool:
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))


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
        made[main] = _pixels(config, batch, generator, float_dtype(model))
    else:
        vocab = int(getattr(text, "vocab_size", None) or _embedding_rows(model))
        sounds = _sounds(model, config, main, batch, length, generator)
        if sounds is not None:
            made[main] = sounds
        else:
            made[main] = torch.randint(0, vocab, (batch * _rows(model, config, main), length), generator=generator)
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = torch.randint(0, vocab, (batch, length + 2), generator=generator)
        # A padding id among random ids would mask positions; ones say that every position is real.
        if sounds is None and "attention_mask" in names and getattr(config, "is_encoder_decoder", False):
            made["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    return made


def _rows(model: nn.Module, config: Any, name: str) -> int:
    """Rows of ``name`` for each of the batch, such as one a codebook, as the docstring of forward gives its shape."""
    said = re.search(rf"\b{name} \([^)]*of shape `\(batch_size \* (\w+),", _innermost(model).forward.__doc__ or "")
    rows = getattr(config, said[1], 1) if said else 1
    return rows if isinstance(rows, int) else 1


def _sounds(
    model: nn.Module, config: Any, name: str, batch: int, length: int, generator: torch.Generator
) -> Tensor | None:
    """Sounds as the first convolution reads them: features, ``(batch, mel bins, frames)``, or ``(batch, samples)``.

    An encoder with a table of positions may take one length of features alone, that which fills it: Whisper. Of
    samples, as many as ``length`` positions are made of.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d)]
    if name == "input_values" and convolutions and convolutions[0].in_channels == 1:
        samples = length
        for convolution in reversed([m for m in convolutions if m.groups == 1 and m.padding in (0, (0,))]):
            samples = (samples - 1) * convolution.stride[0] + convolution.kernel_size[0]
        return torch.randn(batch, samples, generator=generator).to(float_dtype(model))
    bins = getattr(config, "num_mel_bins", None)
    if name != "input_features" or not convolutions or convolutions[0].in_channels != bins:
        return None
    positions = getattr(config, "max_source_positions", None)
    frames = math.prod(m.stride[0] for m in convolutions) * (positions if isinstance(positions, int) else length)
    return torch.randn(batch, bins, frames, generator=generator).to(float_dtype(model))


def _innermost(model: nn.Module) -> nn.Module:
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def _embedding_rows(model: nn.Module) -> int:
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not rows:
        raise TraceError(f"no vocabulary size found for {type(model).__name__}: pass inputs={{name: tensor}} to trace")
    return max(rows)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type of the model's first parameter that has one."""
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
    dtype = float_dtype(model)
    if isinstance(first, nn.Embedding):
        value = torch.randint(0, first.num_embeddings, (batch, length), generator=generator)
    elif isinstance(first, nn.Linear):
        value = torch.randn(batch, length, first.in_features, generator=generator).to(dtype)
    else:
        spatial = [37 - 4 * i for i in range(len(first.kernel_size))]
        value = torch.randn(batch, first.in_channels, *spatial, generator=generator).to(dtype)
    return {required[0].name: value}
