"""REAP: how much an expert adds to the tokens that are sent to it, gate and all (Lasby et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from shear_ir.manager import AnalysisManager
from shear_ir.paths import parent
from shear_ir.program import Program
from shear_passes.analysis.find_groups import FindGroups, Group
from shear_passes.importance.base import Importance, Score, Scored, Scores, Statistic, candidates
from shear_passes.importance.calibration import Calibration, Data, Observer

_CLOSE = 1e-2
"""How far, relative to its norm, the sum of gated experts may be from what the module returns, in any dtype."""


@dataclass(eq=False)
class ExpertUse:
    """Of the experts of one module: ``total``, the sum over tokens sent there of gate times norm of what it returns;
    ``count``: those tokens; both of shape ``(experts,)`` in fp64. ``reason``: why they could not be watched."""

    total: Tensor
    count: Tensor
    reason: str = ""


@dataclass(frozen=True)
class ExpertStatistics(Statistic[Mapping[str, ExpertUse]]):
    """By path of the module that owns stacked experts. Each is run once more on every batch, one choice at a time."""

    requires = (FindGroups, Data)

    def observer(self, program: Program, analyses: AnalysisManager, calibration: Calibration) -> Observer:
        """Watches the modules of all groups of experts."""
        groups = [g for g in analyses.get(FindGroups()) if g.kind == "expert"]
        return ExpertObserver({path: g.size for g in groups if (path := home(g)) is not None})


def home(group: Group) -> str | None:
    """The module that owns the stacked experts: parameters of a matrix for each, which the axis counts."""
    owners = {parent(s.parameter) for s in group.slices if s.dim == 0 and s.expression is group.axis}
    stacked = [o for o in owners if sum(parent(s.parameter) == o for s in group.slices) > 1]
    return stacked[0] if len(stacked) == 1 else None


class ExpertObserver(Observer):
    """Hooks on modules that are called with tokens, choices and gates."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.found = {p: ExpertUse(torch.zeros(n).double(), torch.zeros(n).double()) for p, n in sizes.items()}

    @contextmanager
    def attach(self, calibration: Calibration) -> Iterator[None]:
        with ExitStack() as hooks:
            for path, use in self.found.items():
                module = calibration.model.get_submodule(path)
                hook = _Watch(calibration, use)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def finish(self) -> Mapping[str, ExpertUse]:
        return self.found


@dataclass(eq=False)
class _Watch:
    calibration: Calibration
    use: ExpertUse
    checked: bool = field(default=False, init=False)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.calibration.watching or self.use.reason:
            return
        call = _Call.of(module, args, kwargs)
        if call is None or not isinstance(output, Tensor):
            self.use.reason = "its module is not called with tokens, choices and gates"
            return
        self.calibration.watching = False
        try:
            with torch.no_grad():
                self._look(call, output)
        finally:
            self.calibration.watching = True

    def _look(self, call: _Call, output: Tensor) -> None:
        valid = next((m.flatten() for m in self.calibration.masks if m.numel() == len(call.choices)), None)
        total = torch.zeros_like(output, dtype=torch.float32)
        for place in range(call.choices.shape[1]):
            gate, chosen = call.gates[:, place].float(), call.choices[:, place].long()
            made = call.alone(place).float().reshape(len(chosen), -1)
            total += (gate[:, None] * made).reshape(total.shape)
            here = torch.ones_like(gate) if valid is None else valid.to(gate)
            self._add(chosen, gate * made.norm(dim=1) * here, here)
        if not self.checked and (total - output.float()).norm() > _CLOSE * output.float().norm():
            self.use.reason = "what its module returns is not the sum of gated experts"
        self.checked = True

    def _add(self, chosen: Tensor, worth: Tensor, here: Tensor) -> None:
        use = self.use
        use.total, use.count = use.total.to(worth.device), use.count.to(worth.device)
        use.total.index_add_(0, chosen, worth.double())
        use.count.index_add_(0, chosen, here.double())


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module of experts: ``choices`` int and ``gates`` float, both of shape ``(tokens, chosen)``."""

    module: nn.Module
    given: list[Any]
    named: dict[str, Any]
    choices: Tensor
    gates: Tensor

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """None when the arguments are not of that form."""
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        choices = [t for t in tensors if not t.is_floating_point() and t.dim() == 2]
        if len(choices) != 1:
            return None
        gates = [t for t in tensors if t.is_floating_point() and t.shape == choices[0].shape]
        if len(gates) != 1 or len(tensors) != 3:
            return None
        return cls(module, list(args), kwargs, choices[0], gates[0])

    def alone(self, place: int) -> Tensor:
        """What the expert that stands at ``place`` of each token's choices returns, with a gate of one."""
        part = slice(place, place + 1)

        def other(value: Any) -> Any:
            if value is self.choices:
                return self.choices[:, part]
            return torch.ones_like(self.gates[:, part]) if value is self.gates else value

        args, kwargs = [other(v) for v in self.given], {k: other(v) for k, v in self.named.items()}
        return cast(Tensor, self.module.forward(*args, **kwargs))


@dataclass(frozen=True)
class Reap(Importance):
    """The mean, over the tokens that are sent to an expert, of its gate times the norm of what it returns.

    Scores groups of experts alone. An expert that no token was sent to has score 0.
    """

    requires = (FindGroups, ExpertStatistics)

    def statistics(self) -> tuple[Statistic[Any], ...]:
        """Gates and norms."""
        return (ExpertStatistics(),)

    def run(self, program: Program, analyses: AnalysisManager) -> Scores:
        """Raises ``PlanError`` without data; asking for a group that is no group of experts does so later."""
        found = analyses.get(ExpertStatistics())
        scores: dict[Group, Score] = {}
        reasons: dict[Group, str] = {}
        for group in candidates(analyses):
            use = found.get(home(group) or "") if group.kind == "expert" else None
            if use is None or use.reason:
                reasons[group] = use.reason if use is not None else "it is no group of experts that a module owns"
                continue
            scores[group] = (use.total / use.count.clamp_min(1)).cpu().numpy()
        return Scored("reap", scores, reasons)
