"""A model run in another precision than the one it is kept in, and masked, one operator's tensors at a time.

Nothing is copied or changed: what an operator is given is converted on its way in, and dropped after it. What a model's
own code asks for in float32 (a softmax, a norm, a rotary table) is computed in the same precision as everything else,
so that in float64 only float64 rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from shear_ir.frontend.kept import forget_kept
from shear_ir.frontend.unchanged import copied

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_IN_PARTS = (torch.ops.aten.t.default, torch.ops.aten.embedding.default)
_AT_ONCE = 1 << 20
"""Entries of a weight that are converted at once, where an operator allows it."""
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


@dataclass(frozen=True)
class Fill:
    """Entries ``gone`` (sorted indices, shape ``(n,)``) along ``dim`` that read as ``value``."""

    dim: int
    gone: Tensor
    value: float = 0.0


FillsByTensor = Mapping[int, Sequence[Fill]]
"""By the id of a tensor: what its removed entries read as."""


class InPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base has no annotations
    """While it is on, every operator computes in ``dtype``, or in the precision of its operands where it is None.

    ``model``: its parameters, which forward does not write to, are converted anew for each operator that reads them.
    Its buffers and whatever else has a lower precision are copied once and kept, so that what forward writes there can
    be read again and the tensor itself stays as it is. ``masks``, ``values``: how tensors read. ``nudged``: by the id
    of a tensor, the relative step by which its entries are moved, up or down by chance.
    """

    def __init__(
        self,
        dtype: torch.dtype | None,
        model: nn.Module,
        masks: FillsByTensor | None = None,
        values: Mapping[int, Tensor] | None = None,
        nudged: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.masks = masks or {}
        self.values = values or {}
        self.nudged = nudged or {}
        self.parameters = {id(t): t for t in model.parameters()}
        self.buffers = {id(t): t for t in model.buffers()}
        self.places = {place: key for key, t in self.parameters.items() if (place := _place(t)) is not None}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.later: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = self._large(args[0]) if func in _IN_PARTS else None
        if key is not None and func is torch.ops.aten.embedding.default:
            return self._looked_up(key, args[1])
        if key is not None:
            later = func(*args)
            self.later[id(later)] = (later, key)
            return later
        if func in _PRODUCTS and id(args[-1]) in self.later and not kwargs:
            return self._by_columns(self.later[id(args[-1])][1], *map(self._given, args[:-1]))
        args, kwargs = tree_map(self._given, (args, kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is torch.float64:
            return _grouped_products(*args, **kwargs)
        return tree_map(self._made, func(*args, **kwargs))

    def _given(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._raised(value)
        if not isinstance(value, Tensor):
            return value
        key = self._parameter(value)
        if key is not None:
            return self._read(key, value)
        if id(value) in self.later:
            key = self.later[id(value)][1]
            return self._read(key, self.parameters[key]).t()
        if id(value) in self.kept:
            return self.kept[id(value)][1]
        dtype = self._raised(value.dtype)
        if dtype is value.dtype and id(value) not in self.buffers:
            return value
        # The tensor is kept as well, so that its id stays its own.
        self.kept[id(value)] = (value, self._masked(id(value), value.to(dtype, copy=True)))
        return self.kept[id(value)][1]

    def _large(self, value: Tensor) -> int | None:
        """The id of a matrix, as of a vocabulary, of which a few rows are converted at a time; None for another."""
        large = value.numel() > _AT_ONCE and self._raised(value.dtype) is not value.dtype
        key = self._parameter(value) if large else None
        return None if key in self.nudged else key

    def _rows(self, key: int, indices: Tensor) -> Tensor:
        """These rows of a parameter, as they read; shape ``(len(indices), in)``."""
        own = self.values.get(key, self.parameters[key]).detach().index_select(0, indices)
        own = own.to(self._raised(own.dtype))
        for fill in self.masks.get(key, ()):
            gone = fill.gone if fill.dim else torch.isin(indices, fill.gone.to(indices)).nonzero()[:, 0]
            own.index_fill_(fill.dim, gone, fill.value)
        return own

    def _looked_up(self, key: int, indices: Tensor) -> Tensor:
        used, places = torch.unique(indices, return_inverse=True)
        return self._rows(key, used)[places]

    def _by_columns(self, key: int, *others: Tensor) -> Tensor:
        """``others[-1]`` times a parameter ``(out, in)``, transposed, plus ``others[0]`` where there are two."""
        out, width = self.parameters[key].shape
        step, device = max(1, _AT_ONCE // width), self.parameters[key].device
        made = others[-1].new_empty(len(others[-1]), out)
        for i in range(0, out, step):
            part = torch.arange(i, min(i + step, out), device=device)
            made[:, i : i + step] = others[-1] @ self._rows(key, part).to(others[-1]).t()
        return made if len(others) == 1 else made + others[0]

    def _made(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self._raised(value.dtype)
        return value if dtype is value.dtype else value.to(dtype)

    def _parameter(self, value: Tensor) -> int | None:
        if id(value) in self.parameters:
            return id(value)
        place = _place(value) if self.places else None
        return None if place is None else self.places.get(place)

    def _read(self, key: int, value: Tensor) -> Tensor:
        dtype = self._raised(value.dtype)
        if key not in self.masks and key not in self.values and key not in self.nudged:
            return value if dtype is value.dtype else value.detach().to(dtype)
        return self._masked(key, self.values.get(key, value).detach().to(dtype, copy=True))

    def _masked(self, key: int, own: Tensor) -> Tensor:
        for fill in self.masks.get(key, ()):
            own.index_fill_(fill.dim, fill.gone, fill.value)
        if key in self.nudged:
            generator = torch.Generator().manual_seed(own.numel())
            signs = torch.randint(0, 2, own.shape, generator=generator).to(own) * 2 - 1
            own.mul_(1 + self.nudged[key] * signs)
        return own

    def _raised(self, dtype: torch.dtype) -> torch.dtype:
        if self.dtype is None or not (dtype.is_floating_point or dtype.is_complex):
            return dtype
        target = _COMPLEX[self.dtype] if dtype.is_complex else self.dtype
        return target if dtype.itemsize < target.itemsize else dtype


def _grouped_products(
    rows: Tensor, matrices: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """``aten._grouped_mm``, which has no kernel for float64: each group of ``rows`` times its own matrix.

    ``rows`` has shape ``(n, in)`` or ``(groups, n, in)``, ``matrices`` ``(groups, in, out)`` or ``(in, n)``;
    ``offs``: where each group ends, shape ``(groups,)``.
    """
    if offs is None:
        return torch.bmm(rows, matrices)
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if rows.dim() == 2 and matrices.dim() == 3:
        made = rows.new_zeros(rows.shape[0], matrices.shape[-1])
        for matrix, (start, stop) in zip(matrices, spans, strict=True):
            made[start:stop] = rows[start:stop] @ matrix
    elif matrices.dim() == 2 and rows.dim() == 3:
        made = rows.new_zeros(rows.shape[1], matrices.shape[-1])
        for part, (start, stop) in zip(rows, spans, strict=True):
            made[:, start:stop] = part @ matrices[:, start:stop]
    else:
        made = torch.stack([rows[:, start:stop] @ matrices[start:stop] for start, stop in spans])
    return made if bias is None else made + bias


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where the memory of a tensor lies, by which ``.data`` of a parameter is known as well."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
        return None
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def bare_copy(model: nn.Module) -> nn.Module:
    """The modules of ``model`` anew, in evaluation mode, over the same parameters.

    So what forward keeps on modules is kept there. A graph is returned as it is: it keeps nothing.
    """
    if isinstance(model, fx.GraphModule):
        return model
    bare = copied(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    forget_kept(bare)
    return bare.eval()


def unit_of(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to ``dtype``."""
    return float(torch.finfo(dtype).eps) / 2
