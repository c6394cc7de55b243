"""Watching products as they run: for weights that no module of their own multiplies, such as stacked experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from shear_passes.analysis.consumers import Key
from shear_passes.ops.traits import traits_of_target


class ProductWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class has no types
    """Calls ``see(key, x)`` with the other operand, features last, whenever a product reads a view of a parameter.

    A parameter is known by its memory and its dim by its stride, so any view of it counts, and so does a choice of its
    matrices, ``W[ids]``, while it lives; no other copy does.
    """

    def __init__(self, owners: Mapping[Key, nn.Parameter], see: Callable[[Key, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see
        self.by_memory: dict[int, list[tuple[Key, int, int]]] = {}
        for key, tensor in owners.items():
            place = (key, tensor.stride(key[1]), tensor.shape[key[1]])
            self.by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(place)
        self.from_end = {key: tensor.dim() - key[1] for key, tensor in owners.items()}
        self.choices: dict[int, tuple[StorageWeakRef, list[tuple[Key, int, int]]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the call as it is, and looks at its operands when it is a product."""
        row = traits_of_target(func)
        if row.factors is not None:
            left, right = (args[p] for p in row.factors)
            self._look(left, right, -2)
            self._look(right.transpose(-1, -2), left, -1)
        made = func(*args, **(kwargs or {}))
        if row.picks and row.chooses and isinstance(made, Tensor):
            self._note(args[0], made)
        return made

    def _note(self, source: Tensor, made: Tensor) -> None:
        """Remember which matrices were chosen, and forget those that are gone."""
        self.choices = {ptr: kept for ptr, kept in self.choices.items() if not kept[0].expired()}  # type: ignore[no-untyped-call]
        known = self.by_memory.get(source.untyped_storage().data_ptr(), ())
        places = [(key, made.stride(-self.from_end[key]), size) for key, _, size in known if made.dim() > 2]
        if places:
            storage = made.untyped_storage()
            self.choices[storage.data_ptr()] = StorageWeakRef(storage), places  # type: ignore[no-untyped-call]

    def _look(self, x: Tensor, weight: Tensor, summed: int) -> None:
        memory = weight.untyped_storage().data_ptr()
        reference, chosen = self.choices.get(memory, (None, []))
        if reference is not None and reference.expired():  # type: ignore[no-untyped-call]
            chosen = []
        for key, stride, size in (*self.by_memory.get(memory, ()), *chosen):
            if weight.stride(summed) == stride and x.shape[-1] == size:
                self.see(key, x)
