"""LHSPG: LoRA half-space projected gradient, around any optimizer (LoRAShear, section 3 of the reference)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.plans import Plan
from shear_passes.analysis.find_groups import Groups
from shear_training.saliency import DEFAULT_WEIGHTS, Measured, check_weights, saliency
from shear_training.schedule import Periods
from shear_training.units import Units, UnitSlice, norms_along, require_no_dropout


class LHSPG(torch.optim.Optimizer):
    """An optimizer that trains adapters while the chosen number of units of the base goes to exactly zero.

    It steps ``optimizer`` (SGD, AdamW, ...) over the adapters' parameters. After each step the redundant units'
    adapters are folded into their base slices, which shrink, and are zero at the end of their period; at a period's
    end the adapters of the important units are merged into a base in float32 or wider (what they learned stays in them
    where the base is narrower), and the least salient of them become redundant.

    ``groups``: those of the traced model, with or without its adapters. ``targets``: group name to the number of its
    units that become zero. ``criteria`` weighs those of ``shear_training.saliency`` and, by their names, those of
    ``scores``, which ``shear_ir.scores`` measured beforehand. ``compete``: only the sum of the targets over a kind
    counts and units of a kind compete across layers; at least one stays in every group. Usable in any loop:
    ``zero_grad``, ``backward``, ``step``; of several processes all of them step. Base weights change too: save
    ``base_tensors()`` beside ``state_dict()``. Raises ``PlanError`` (see also ``Units``).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, groups: Groups, targets: Mapping[str, int],
        periods: Periods | None = None, *, criteria: Mapping[str, float] = DEFAULT_WEIGHTS, compete: bool = False,
        scores: Measured | None = None,
    ) -> None:  # fmt: skip
        # Like accelerate's, this wrapper has no groups and no state of its own: Optimizer.__init__ would make some.
        self.scores = scores or {}
        check_weights(criteria, self.scores)
        self.optimizer = optimizer
        self.periods = periods or Periods()
        self.criteria = dict(criteria)
        self.compete = compete
        self.targets = {name: count for name, count in targets.items() if count or compete}
        self.step_count = 0
        self._quotas: list[dict[str, int]] = []
        self.units: Units | None = None
        self._index: list[_Index] = []
        if any(self.targets.values()):
            self.units = Units(model, _targeted(groups, self.targets))
            require_no_dropout(self.units)
            self.status = torch.zeros(self.units.count, dtype=torch.int16)
            totals: dict[str, int] = {}
            for group in self.units.groups:
                totals[group.kind] = totals.get(group.kind, 0) + self.targets[group.name]
            self._quotas = self.periods.quotas(totals)

    @classmethod
    def from_plan(
        cls, optimizer: torch.optim.Optimizer, model: nn.Module, groups: Groups, plan: Plan,
        periods: Periods | None = None, **options: Any,
    ) -> LHSPG:  # fmt: skip
        """As many units of each group as ``plan`` removes; which ones, training decides."""
        return cls(optimizer, model, groups, {c.group: c.size - len(c.kept) for c in plan.cuts}, periods, **options)

    @property
    def total_units(self) -> int:
        """K: how many units are zero at the end."""
        return sum(self.targets.values())

    @property
    def redundant(self) -> Tensor:
        """The units chosen so far, zero or on their way, as a mask of shape ``(units,)``."""
        return self.status > 0

    @property
    def finished(self) -> bool:
        """Whether every chosen unit is zero."""
        return self.units is None or self.step_count >= self.periods.total

    def zero_units(self) -> int:
        """How many units are exactly zero in every tensor, adapters included; counted in the tensors."""
        return 0 if self.units is None else int((~self.units.nonzero()).sum())

    def base_tensors(self) -> dict[str, Tensor]:
        """The base tensors that LHSPG changes, by name: what a checkpoint must hold beside the optimizer's state."""
        if self.units is None:
            return {}
        merged = {adapter.base: adapter.weight for adapter in self._merging()}
        return {**{place.name: place.tensor for place in self.units.places}, **merged}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the optimizer inside."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of the optimizer inside."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the optimizer inside."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Pass on to the optimizer inside."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Pass on to the optimizer inside."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the optimizer inside, then the projection."""
        if self.units is not None and self.step_count == 0 and self.periods.warmup == 0:
            self._choose(0)
        loss: float | None = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        with torch.no_grad():
            self._project()
        self.step_count += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer inside and of the pruning; the base weights are in ``base_tensors``."""
        mine: dict[str, Any] = {"step": self.step_count, "settings": self._settings()}
        if self.units is not None:
            mine["status"] = self.status.clone()
        return {**self.optimizer.state_dict(), "lhspg": mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``PlanError`` when the state is that of another schedule, other units or other criteria."""
        mine = state_dict.get("lhspg")
        if mine is None or mine["settings"] != self._settings():
            raise PlanError("the saved state is of another LHSPG run: its targets, periods or criteria differ")
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "lhspg"})
        self.step_count = int(mine["step"])
        if self.units is not None:
            self.status = mine["status"].clone().cpu()
            self._index_places(self.periods.period(self.step_count))

    def _settings(self) -> dict[str, Any]:
        return {
            "targets": dict(self.targets), "periods": asdict(self.periods), "criteria": dict(self.criteria),
            "compete": self.compete,
        }  # fmt: skip

    def _project(self) -> None:
        step = self.step_count
        if self.units is None:
            return
        if 0 <= self.periods.period(step) < self.periods.count:
            self._shrink(self.units, self.periods.left(step))
        self._hold_zeros()
        if self.periods.ends(step):
            score = saliency(self.units, self.criteria, self.scores)
            if step + 1 > self.periods.warmup:
                self._merge()
            following = self.periods.period(step + 1)
            if following < self.periods.count:
                self._choose(following, score)
            else:
                self._index_places(following)
                self._require_zeros(self.units)
            self._forget_zeros()

    def _shrink(self, units: Units, left: int) -> None:
        """One step of the redundant units: fold the adapters in, take ``1/left`` of the norm, zero what turned."""
        squares = torch.zeros(units.count, device=units.device)
        folded = torch.zeros(units.count, device=units.device)
        for at in self._index:
            if len(at.current):
                base = at.place.tensor.index_select(at.place.dim, at.current).float()
                delta = at.place.delta(at.current)
                squares.index_add_(0, at.unit, norms_along(base * base, at.place.dim).to(units.device))
                if delta is not None:
                    folded.index_add_(0, at.unit, norms_along(base * delta, at.place.dim).to(units.device))
        stays = 1.0 - 1.0 / left
        # u = x + D and lam = |x| / left, so <u - lam x/|x|, x> = stays |x|^2 + <D, x>.
        inner = stays * squares + folded
        alive = (inner >= self.periods.eps * squares) & (squares > 0) & (left > 1)
        for at in self._index:
            if len(at.current):
                place = at.place
                new = stays * place.tensor.index_select(place.dim, at.current).float()
                delta = place.delta(at.current)
                new = new if delta is None else new + delta
                mask = alive[at.unit].to(new.device).view([-1 if d == place.dim else 1 for d in range(new.dim())])
                place.tensor.index_copy_(place.dim, at.current, torch.where(mask, new, 0.0).to(place.tensor.dtype))

    def _hold_zeros(self) -> None:
        """What is left of the redundant units' adapters is zero; so are trained bases of those that are gone."""
        for at in self._index:
            for adapter in at.place.adapters:
                factor, dim = at.place.factor_dim(adapter)
                factor.index_fill_(dim, at.gone, 0)
            if at.place.tensor.requires_grad:
                self._fill(at.place.tensor, at.place.dim, at.zero)

    def _forget_zeros(self) -> None:
        """Units that are zero have no moments, or those would move them after the last period."""
        # Units on their way keep theirs: folding moves what a row is, not its gradient. Adam counts the steps of a
        # tensor, not of its rows, so rows that began anew at each step would make steps some three times too long.
        for at in self._index:
            for adapter in at.place.adapters:
                self._forget(*at.place.factor_dim(adapter), at.zero)

    def _fill(self, param: Tensor, dim: int, index: Tensor) -> None:
        param.index_fill_(dim, index, 0)
        self._forget(param, dim, index)

    def _forget(self, param: Tensor, dim: int, index: Tensor) -> None:
        for value in self.optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor) and value.shape == param.shape:
                value.index_fill_(dim, index, 0)

    def _merging(self) -> list[Any]:
        """The adapters of the tensors that units are in; those of frozen groups are merged by whoever ends the run."""
        assert self.units is not None
        touched = {adapter for place in self.units.places for adapter in place.adapters}
        return [adapter for adapter in self.units.adapters if adapter in touched]

    def _merge(self) -> None:
        """``W += scaling · B·A``, ``B = 0`` and its optimizer state: the function stays the same, A too."""
        for adapter in self._merging():
            weight, b = adapter.weight, adapter.factors[1]
            if not _holds_updates(weight.dtype):
                continue
            weight.data.copy_((weight.data.float() + adapter.delta()).to(weight.dtype))
            self._fill(b, 0, torch.arange(b.shape[0], device=b.device))
            for value in self.optimizer.state.get(b, {}).values():
                # Adam's count of steps: moments that begin anew under an old count make steps several times too long.
                if isinstance(value, Tensor) and value.dim() == 0:
                    value.zero_()

    def _choose(self, period: int, score: Tensor | None = None) -> None:
        """The least salient important units become redundant, as many as the period takes."""
        assert self.units is not None
        with torch.no_grad():
            score = (saliency(self.units, self.criteria, self.scores) if score is None else score).cpu()
        room = torch.cat([
            torch.full((g.size,), g.size - 1 if self.compete else self.targets[g.name]) for g in self.units.groups
        ])  # fmt: skip
        group = torch.cat([torch.full((g.size,), i) for i, g in enumerate(self.units.groups)])
        room -= torch.bincount(group[self.redundant], minlength=len(self.units.groups))[group]
        for kind, numbers in self.units.kinds().items():
            free = numbers[self.status[numbers] == 0]
            order = free[torch.argsort(score[free], stable=True)]
            # Of each group no more than it has room for: its place in the order is its count so far.
            ranks = _rank_within(group[order])
            able = order[ranks < room[order]]
            self.status[able[: self._quotas[period][kind]]] = period + 1
        self.status = _agreed(self.status, self.units.device)
        self._index_places(period)

    def _index_places(self, period: int) -> None:
        """Where the redundant units lie in the coming period; computed once a period."""
        assert self.units is not None
        none = torch.tensor([False])  # the last entry, which owner -1 reads
        current = torch.cat([(self.status == period + 1) & self.redundant, none])
        gone = torch.cat([self.redundant, none])
        self._index = [_Index.of(place, current, gone, self.units.device) for place in self.units.places]

    def _require_zeros(self, units: Units) -> None:
        alive = units.nonzero().cpu() & self.redundant
        if bool(alive.any()) or int(self.redundant.sum()) != self.total_units:
            raise RuntimeError(f"{int(alive.sum())} of {self.total_units} redundant units are not zero")


@dataclass(frozen=True, eq=False)
class _Index:
    """Indices of a place: of the units that shrink in this period, of all redundant ones, of those already zero.

    They are on the device of the place's tensor, but for ``unit``, the units that ``current`` is of: it is where sums
    over units are, for a model may lie on several devices.
    """

    place: UnitSlice
    current: Tensor
    unit: Tensor
    gone: Tensor
    zero: Tensor

    @classmethod
    def of(cls, place: UnitSlice, current: Tensor, gone: Tensor, sums: torch.device) -> _Index:
        owner, device = place.owner.cpu(), place.tensor.device
        found = [mask[owner].nonzero().flatten() for mask in (current, gone, gone & ~current)]
        return cls(place, found[0].to(device), owner[found[0]].to(sums), found[1].to(device), found[2].to(device))


def _agreed(status: Tensor, device: torch.device) -> Tensor:
    """That of the first process in all of them: sums on a GPU differ in the last bit, and a choice may hang on it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return status
    told = status.to(device, torch.int32)  # not every way to send takes a narrower one
    dist.broadcast(told, src=0)
    return told.to(status.device, status.dtype)


def _targeted(groups: Groups, targets: Mapping[str, int]) -> list[Any]:
    found = []
    for name, count in targets.items():
        group = groups.by_name.get(name)
        if group is None:
            raise PlanError(f"there is no group {name}; groups are named like {next(iter(groups)).name}")
        if not group.prunable:
            raise PlanError(f"{name} cannot lose units: {group.reason}")
        if group.axis in groups.zeros.routers:
            raise PlanError(
                f"{name} counts experts: zero weights do not say that one is never routed to, so prune them at once"
            )
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < group.size:
            raise PlanError(f"{name} has {group.size} units: a whole number below that can become zero, not {count}")
        found.append(group)
    return found


def _holds_updates(dtype: torch.dtype) -> bool:
    """Whether a base of this dtype can take what adapters learned in a period.

    One in half precision cannot: most of the changes are below the last place of its weights and would be rounded away
    (a third of the norm of a period's update in bfloat16 on a small model, three quarters on SmolLM2). So there the
    adapters keep what they learned until they are merged for good: the function does not move at all, no copy of the
    base in float32 is held, and a checkpoint has nothing more in it. In exchange the saliency criteria see all that
    was learned since the run began, and all of it has the rank of one adapter.
    """
    return torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps


def _rank_within(labels: Tensor) -> Tensor:
    """How many equal labels stand before each; shape ``(n,)``."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels) if len(labels) else labels
    starts = torch.cumsum(counts, 0) - counts
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - starts[labels[order]]
    return ranks
