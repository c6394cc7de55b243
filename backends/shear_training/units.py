"""The units of groups as places in live tensors: sums over whole units, masks, exact zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.frontend.adapters import Adapter, find_adapters
from shear_passes.analysis.find_groups import Group


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """A dim of one tensor in which units own indices.

    ``owner``: the unit that owns each index of the dim, -1 for none, shape ``(size of the dim,)``. ``adapters``: those
    whose B has these indices as its rows (``rows``) or whose A has them as its columns.
    """

    name: str
    tensor: nn.Parameter
    dim: int
    owner: Tensor
    adapters: tuple[Adapter, ...] = ()
    rows: bool = False

    def factor_dim(self, adapter: Adapter) -> tuple[Tensor, int]:
        """The factor of ``adapter`` that leaves with these indices, and its dim."""
        a, b = adapter.factors
        return (b, 0) if self.rows else (a, 1)

    def delta(self, index: Tensor) -> Tensor | None:
        """``scaling · B·A`` at these indices of the dim in fp32, None without an adapter."""
        total: Tensor | None = None
        for adapter in self.adapters:
            part = self._delta(adapter, index)
            total = part if total is None else total + part
        return total

    def _delta(self, adapter: Adapter, index: Tensor) -> Tensor:
        a, b = adapter.factors
        if a.dim() != 2 or adapter.row_dim is None:
            return adapter.delta().index_select(self.dim, index)
        if self.rows:
            made = adapter.scaling * (b.index_select(0, index).float() @ a.float())
        else:
            made = adapter.scaling * (b.float() @ a.index_select(1, index).float())
        return made if adapter.row_dim == 0 else made.T


class Units:
    """Every unit of the given groups, numbered 0 to ``count - 1`` in the order of the groups.

    ``model`` is the traced model, or that model with adapters: tensors are found under their base names. Adapters
    count as what they add to the base tensors. Raises ``PlanError`` for groups that share elements, quantised
    tensors, sharded ones and adapters whose merge would not be ``base + scaling · B·A``.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model = model
        self.groups = tuple(groups)
        sizes = [g.size for g in self.groups]
        self.starts = dict(zip(self.groups, np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist(), strict=True))
        self.count = sum(sizes)
        self.adapters = tuple(a for a in find_adapters(model) if a.active)
        for adapter in self.adapters:
            _require_mergeable(adapter, model)
        self._by_base: dict[str, list[Adapter]] = {}
        for adapter in self.adapters:
            self._by_base.setdefault(adapter.base, []).append(adapter)
        self.places = tuple(self._places())
        self._check()

    @property
    def device(self) -> torch.device:
        """Where sums over units are kept: with the first tensor."""
        return self.places[0].tensor.device

    def of(self, group: Group) -> slice:
        """The numbers of the units of ``group``."""
        return slice(self.starts[group], self.starts[group] + group.size)

    def kinds(self) -> dict[str, Tensor]:
        """Kind to the numbers of its units, shape ``(units,)``."""
        found: dict[str, list[Tensor]] = {}
        for group in self.groups:
            span = self.of(group)
            found.setdefault(group.kind, []).append(torch.arange(span.start, span.stop))
        return {kind: torch.cat(parts) for kind, parts in found.items()}

    def sizes(self) -> Tensor:
        """Number of base elements of each unit, shape ``(count,)``, fp32."""
        return self.total(lambda place: torch.full_like(place.owner, _others(place), dtype=torch.float32))

    def total(self, of_place: Callable[[UnitSlice], Tensor]) -> Tensor:
        """Sum over each unit's places of ``of_place(place)``, which gives a number per index; shape ``(count,)``."""
        total = torch.zeros(self.count + 1, device=self.device)
        for place in self.places:
            # Indices that no unit owns (-1) are summed in the last entry and dropped.
            total.index_add_(0, place.owner.to(self.device) % (self.count + 1), of_place(place).to(self.device))
        return total[:-1]

    def squares(self) -> Tensor:
        """Sum of squares of each unit's base slices, shape ``(count,)``, fp32."""
        return self.total(lambda place: norms_along(place.tensor.detach().float().square(), place.dim))

    def nonzero(self) -> Tensor:
        """Whether any base element or adapter factor of the unit is not exactly zero, shape ``(count,)``."""

        def entries(place: UnitSlice) -> Tensor:
            found = norms_along((place.tensor.detach() != 0).float(), place.dim)
            for adapter in place.adapters:
                factor, dim = place.factor_dim(adapter)
                found = found + norms_along((factor.detach() != 0).float(), dim)
            return found

        return self.total(entries) > 0

    def kept(self, gone: Tensor) -> dict[Group, npt.NDArray[np.int64]]:
        """Group to its sorted units that stay when the units of the mask ``gone``, shape ``(count,)``, leave."""
        stays = ~gone.cpu().numpy()
        return {group: np.flatnonzero(stays[self.of(group)]) for group in self.groups}

    @contextmanager
    def masked(self, gone: Tensor) -> Iterator[None]:
        """The units of the mask ``gone`` as zeros, in place; every element is put back bit for bit at the end."""
        saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
        flags = torch.cat([gone.cpu(), torch.tensor([False])])
        try:
            for place in self.places:
                index = flags[place.owner.cpu()].nonzero().flatten().to(place.tensor.device)
                factors = [place.factor_dim(adapter) for adapter in place.adapters]
                for tensor, dim in [(place.tensor, place.dim), *factors] if len(index) else []:
                    saved.append((tensor.data, dim, index, tensor.data.index_select(dim, index)))
                    tensor.data.index_fill_(dim, index, 0)
            yield
        finally:
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)

    def _places(self) -> Iterator[UnitSlice]:
        named = {base_name(name): (name, tensor) for name, tensor in self.model.named_parameters()}
        others = {base_name(name) for name, _ in self.model.named_buffers()}
        made_by_adapters = {name for a in find_adapters(self.model) for name in (a.a, a.b, a.b_bias, a.magnitude)}
        for group in self.groups:
            for piece in group.slices:
                if piece.parameter in made_by_adapters or piece.spared:
                    continue
                if base_name(piece.parameter) not in named:
                    if base_name(piece.parameter) in others or piece.parameter.startswith(("c_", "lifted_")):
                        continue  # buffers and constants have nothing to zero
                    raise PlanError(f"the groups are of another model: this one has no parameter {piece.parameter}")
                name, tensor = named[base_name(piece.parameter)]
                if piece.dim >= tensor.dim() or tensor.shape[piece.dim] != piece.expression.size:
                    raise PlanError(f"the groups are of another model: {name} has shape {tuple(tensor.shape)}")
                if len(piece.index_map) != 1:
                    raise PlanError(
                        f"{name} has indices that belong to two units of {group.name}: leave {group.kind} out"
                    )
                (local,) = piece.index_map
                owner = torch.from_numpy(np.where(local >= 0, local + self.starts[group], -1))
                adapters = tuple(self._by_base.get(name, ()))
                rows = any(a.row_dim == piece.dim for a in adapters)
                yield UnitSlice(name, tensor, piece.dim, owner.to(tensor.device), adapters, rows)

    def _check(self) -> None:
        if not self.places:
            raise PlanError("none of the groups has a parameter in this model")
        seen: dict[str, list[UnitSlice]] = {}
        for place in self.places:
            if not place.tensor.is_floating_point() or place.tensor.element_size() < 2:
                raise PlanError(f"{place.name} is quantised ({place.tensor.dtype}): load the model in bf16 or fp32")
            if place.tensor.is_meta or not place.tensor.numel() or hasattr(place.tensor, "device_mesh"):
                raise PlanError(
                    f"{place.name} is not here as a whole tensor (sharded by FSDP?): use DDP or one process"
                )
            for other in seen.setdefault(place.name, []):
                if other.dim != place.dim or bool(((other.owner >= 0) & (place.owner >= 0)).any()):
                    raise PlanError(f"two of the chosen groups share elements of {place.name}: choose fewer kinds")
            seen[place.name].append(place)


def base_name(name: str) -> str:
    """The name that a parameter of a PEFT model has in the base model."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part != "base_layer")


def norms_along(values: Tensor, dim: int) -> Tensor:
    """The sum over all dims but one."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(dim=others) if others else values


def require_no_dropout(units: Units) -> None:
    """Raise ``PlanError`` for adapters with dropout: what a step trains is then not what is projected."""
    for adapter in units.adapters:
        dropout = adapter.layer.lora_dropout
        rate = getattr(dropout[adapter.name], "p", 0.0) if adapter.name in dropout else 0.0
        if rate:
            raise PlanError(
                f"the adapter '{adapter.name}' of {adapter.module} has a dropout of {rate:g}: units can be projected "
                "only without dropout in LoRA"
            )


def _others(place: UnitSlice) -> float:
    return place.tensor.numel() / place.tensor.shape[place.dim]


def _require_mergeable(adapter: Adapter, model: nn.Module) -> None:
    """Only ``base + scaling · B·A`` can be merged step by step."""
    where = f"the adapter '{adapter.name}' of {adapter.module}"
    if adapter.variant is not None or adapter.magnitude is not None:
        raise PlanError(f"{where} is of the variant {adapter.variant}, which LHSPG cannot merge: use plain LoRA")
    if adapter.row_dim is None:
        raise PlanError(f"{where} adapts stacked experts, which LHSPG cannot merge: leave target_parameters out")
    if adapter.b_bias is not None:
        raise PlanError(f"{where} has a bias of its own (lora_bias), which LHSPG cannot merge: leave it out")
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is adapter.weight]
    if len(names) > 1:
        raise PlanError(f"{where} sits on a tied weight ({', '.join(names)}), where a merge would change both readers")
