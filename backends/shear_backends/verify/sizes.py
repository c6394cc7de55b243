"""Inputs of other sizes than those at hand: longer ones, past what a model counts, and ones that share no factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shear_ir.frontend.feeds import call, tensors_in, uncached, with_tensors
from shear_ir.frontend.guards import Guard
from shear_ir.frontend.inputs import Inputs, example_inputs
from shear_ir.frontend.shapes import on_shapes

_LARGEST = 1 << 26
"""Entries of an input that a longer trace may have."""


def longer(
    model: nn.Module, feed: Inputs, limit: int = 1 << 17, asked: frozenset[int] = frozenset()
) -> Iterator[Inputs]:
    """Inputs like ``feed`` past the numbers to ``limit`` that ``model`` holds, or that are ``asked``, longest first.

    Lengths are primes, so that they equal no size. Nothing where the length is not free, as with images.
    """
    now = max((size for value in tensors_in(feed).values() for size in value.shape), default=0)
    numbers = sorted(n for n in numbers_of(model) | asked if now <= n <= limit)
    below, above = -1, len(numbers)
    if numbers and _running(model, feed, None, prime(numbers[-1] + 1)):  # as where positions are rotated
        below = above - 1
    while above - below > 1:  # what is too long stays so when it is longer
        middle = (below + above) // 2
        if _running(model, feed, None, prime(numbers[middle] + 1)):
            below = middle
        else:
            above = middle
    if above < len(numbers):  # up to the limit itself, which may be the number of positions
        numbers.insert(above, prime(numbers[above] - 2, -1) - 1)
        below = above
    for number in reversed(numbers[max(0, below - 1) : below + 1]):
        length = prime(number + 1)
        found = _running(model, feed, None, length) if length > now else None
        if found is not None:
            yield found


def beyond(model: nn.Module, feed: Inputs, guard: Guard, most: int) -> tuple[list[Inputs], bool]:
    """Inputs like ``feed`` for which ``guard`` does not hold and that ``model`` runs on, sizes up to ``most``.

    And whether there may be more of them: sizes that are larger, or that several of its sizes decide.
    """
    found: list[Inputs] = []
    numbers = sorted({n + step for n in guard.numbers for step in (-1, 0, 1) if n + step > 0})
    for name, dim in dict.fromkeys(guard.symbols.values()):
        for size in [n for n in numbers if n <= most]:
            for made in _of_size(model, feed, name, dim, size):
                if not guard.holds(made) and _runs(model, made):
                    found.append(made)
                    break
    return found, any(n > most for n in numbers)


def _of_size(model: nn.Module, feed: Inputs, name: str, dim: int, size: int) -> Iterator[Inputs]:
    """``feed`` with this size in one dim of the tensor ``name``, and of all others that have to follow."""
    if dim == 0:
        yield from _resized(model, feed, size, None)
    elif dim == 1:
        yield from _resized(model, feed, None, size)
    own = tensors_in(feed)[name]
    if dim < own.dim():
        yield with_tensors(feed, lambda tensor: _repeated(tensor, dim, size) if tensor is own else tensor)


def apart(model: nn.Module, feed: Inputs) -> Inputs | None:
    """Inputs like ``feed`` whose batch, and length where that is free, are primes that divide no size of a tensor.

    With them no view fits by chance, as ``h.view(-1, 6)`` does for 3 x 7 x 4 entries. None where the model takes none.
    """
    main = next(iter(tensors_in(feed).values()), None)
    if main is None or not main.dim():
        return None
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    batch = _free(taken, {4, main.shape[0]})
    length = _free(taken, {4, batch, *main.shape[1:2]})
    return _running(model, feed, batch, length) or _running(model, feed, batch, None)


def of_batch(model: nn.Module, feed: Inputs, batch: int) -> Inputs | None:
    """Inputs like ``feed`` of so many rows; None where the model takes none, or ``feed`` has as many."""
    main = next(iter(tensors_in(feed).values()), None)
    return None if main is None or not main.dim() or len(main) == batch else _running(model, feed, batch, None)


def of_length(model: nn.Module, feed: Inputs, length: int) -> Inputs | None:
    """Inputs like ``feed`` of so many positions; None where the model takes none, or ``feed`` has as many."""
    main = next(iter(tensors_in(feed).values()), None)
    free = main is not None and main.dim() > 1 and main.shape[1] != length
    return _running(model, feed, None, length) if free else None


def numbers_of(model: nn.Module) -> set[int]:
    """The whole numbers of a model's config and of its modules' plain attributes, in lists and tuples too."""
    config: Any = getattr(model, "config", None)
    stack: list[Any] = [config.to_dict()] if hasattr(config, "to_dict") else []
    stack += [value for m in model.modules() for name, value in vars(m).items() if not name.startswith("_")]
    found: set[int] = set()
    while stack:
        value = stack.pop()
        if type(value) is int:
            found.add(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
    return found


def prime(number: int, step: int = 1) -> int:
    """The nearest prime at ``number`` or further by ``step``."""
    while number > 2 and any(number % d == 0 for d in range(2, int(number**0.5) + 1)):
        number += step
    return number


def _free(taken: set[int], above: set[int]) -> int:
    """The least prime above these numbers that divides none of ``taken``; the least one where there is none soon."""
    first = found = prime(max(above) + 1)
    while any(size % found == 0 for size in taken if size):
        found = prime(found + 1)
        if found > 8 * first:
            return first
    return found


def _running(model: nn.Module, feed: Inputs, batch: int | None, length: int | None) -> Inputs | None:
    """Inputs like ``feed`` of these sizes, that ``model`` runs on; None where it does on none."""
    return next((made for made in _resized(model, feed, batch, length) if _runs(model, made)), None)


def _runs(model: nn.Module, feed: Inputs) -> bool:
    """Whether ``model`` takes inputs of these sizes."""
    if any(value.numel() > _LARGEST for value in tensors_in(feed).values()):
        return False
    try:
        _fake_run(model, feed)
    except Exception:  # too long for its positions, in the model's own words
        return False
    return True


def _resized(model: nn.Module, feed: Inputs, batch: int | None, length: int | None) -> Iterator[Inputs]:
    """``feed`` made anew in these sizes, where it could have been made, and its own rows and positions repeated."""
    try:
        alike = _kinds(example_inputs(model)) == _kinds(feed)
        made = example_inputs(model, batch=batch, length=length) if alike else {}
    except Exception:  # no inputs can be made, or a config that says other things than the model
        made = {}
    if made and (length is None or length in next(iter(tensors_in(made).values())).shape):
        yield made
    own = tiled(feed, batch, length)
    if own is not None:
        yield own


def _kinds(feed: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    return sorted((name, value.dim(), str(value.dtype)) for name, value in tensors_in(feed).items())


def tiled(feed: Mapping[str, Any], batch: int | None, length: int | None) -> Inputs | None:
    """``feed`` with its rows and positions repeated, or left out, until there are so many; None where it is not clear.

    The batch is dim 0, if of all tensors; the length is dim 1 of integers, and of floats that have three dims.
    """
    tensors = [value for value in tensors_in(feed).values() if value.dim()]
    whole = [t for t in tensors if t.dim() > 1 and not t.is_floating_point()]
    positions = {t.shape[1] for t in whole or [t for t in tensors if t.dim() == 3]}
    rows = {t.shape[0] for t in tensors}
    if (batch and len(rows) != 1) or (length and len(positions) != 1) or 0 in rows | positions:
        return None

    def change(tensor: Tensor) -> Tensor:
        if batch and tensor.dim():
            tensor = _repeated(tensor, 0, batch)
        spread = tensor.dim() == 3 or (tensor.dim() > 1 and not tensor.is_floating_point())
        return _repeated(tensor, 1, length) if length and spread and tensor.shape[1] in positions else tensor

    return with_tensors(feed, change)


def _repeated(tensor: Tensor, dim: int, size: int) -> Tensor:
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])


def _fake_run(model: nn.Module, feed: Inputs) -> None:
    """Run ``model`` on shapes alone, as torch.export does; what it keeps and writes is not touched."""
    with on_shapes(model, feed) as (copy, given, _):
        call(copy().eval(), given, **uncached(model))
