"""A model that never routes to some of its experts: the reference for one from which they were removed.

It is the model's own forward, run with an eye on the tensors that score experts: a product with such a matrix is minus
infinity for the experts that are gone, and so is a vector of scores. Nothing is known here of how routers are written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shear_ir.axes import Indices

aten = torch.ops.aten

_MATRICES = "_never_routed"

_FACTORS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2)}
"""Products, with the places of their factors."""


def split(
    model: nn.Module, routers: Mapping[str, tuple[int, Indices]]
) -> tuple[list[tuple[Tensor, int, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The tensors of ``routers`` that are scores themselves, with their dim and who is gone, and those that make them.

    ``routers``: by name of a tensor that scores experts, the dim that counts them and those that may be chosen.
    """
    scores, matrices = [], []
    named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    for name, (dim, kept) in routers.items():
        tensor = named[name]
        gone = torch.from_numpy(np.setdiff1d(np.arange(tensor.shape[dim]), kept)).to(tensor.device)
        # A matrix of one column scores by a product, too.
        if tensor.numel() == tensor.shape[dim] and dim == tensor.dim() - 1:
            scores.append((tensor, dim, gone))
        else:
            matrices.append((tensor, gone))
    return scores, matrices


def never_route(model: nn.Module, routers: Mapping[str, tuple[int, Indices]]) -> None:
    """Change ``model``: by name of a tensor that scores experts, the dim that counts them and those that may be chosen.

    A vector is changed in place; for a matrix, ``forward`` is wrapped.
    """
    scores, matrices = split(model, routers)
    for tensor, dim, gone in scores:
        with torch.no_grad():
            tensor.index_fill_(dim, gone, -math.inf)
    if matrices:
        _wrap(model, matrices)


def _wrap(model: nn.Module, matrices: list[tuple[Tensor, Tensor]]) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def never_routed(*args: Any, **kwargs: Any) -> Any:
        with _NeverRouted(matrices):
            return forward(*args, **kwargs)

    # On the instance, where modules look before they look at their class.
    object.__setattr__(model, "forward", never_routed)
    object.__setattr__(model, _MATRICES, matrices)


def routing(model: nn.Module) -> AbstractContextManager[Any]:
    """What is on while ``forward`` of such a model runs, for a graph of it, which a trace makes without it."""
    matrices = vars(model).get(_MATRICES)
    return routing_by(matrices) if matrices else nullcontext()


def routing_by(matrices: list[tuple[Tensor, Tensor]]) -> AbstractContextManager[Any]:
    """While it is on, products with the given matrices are minus infinity where these have rows that are gone."""
    return _NeverRouted(matrices)


class _NeverRouted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base has no annotations
    """While it is on, products with the given matrices are minus infinity where these have rows that are gone."""

    def __init__(self, matrices: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By memory, so that views of a matrix are known as well; what is listed here stays alive.
        self.gone = {_memory(matrix): gone for matrix, gone in matrices}
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FACTORS:
            left, right = (args[place] for place in _FACTORS[func])
            for factor, dim in ((left, -2), (right, -1)):
                if _memory(factor) in self.gone:
                    return result.index_fill(dim, self.gone[_memory(factor)], -math.inf)
        elif isinstance(result, Tensor) and args and isinstance(args[0], Tensor) and _memory(args[0]) in self.gone:
            self._follow(args[0], result)
        return result

    def _follow(self, matrix: Tensor, result: Tensor) -> None:
        """A copy of a matrix in another type or layout is that matrix."""
        if result.numel() == matrix.numel() and _memory(result) not in self.gone:
            self.gone[_memory(result)] = self.gone[_memory(matrix)]
            self.alive.append(result)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
