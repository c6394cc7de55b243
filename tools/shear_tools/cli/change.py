"""What ``shear-ir prune`` changes in the weights before it shears: ``--add-biases``, ``--rotate``, ``--repair``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shear_ir.errors import CostWarning, PlanError
from shear_tools.cli import console, options, scoring

if TYPE_CHECKING:
    from shear_ir.frontend.load import LoadedModel
    from shear_ir.plans import Plan


def changed(options: Any) -> list[str]:
    """What was done to the weights, by the options of a plan, or of several that were joined."""
    if not isinstance(options, dict):
        return []
    mine = [f"--{name.replace('_', '-')}" for name in ("add_biases", "rotate", "repair") if options.get(name)]
    return [*mine, *(word for inner in options.values() for word in changed(inner))]


@dataclass(frozen=True)
class WeightChanges:
    """What the command line asks for; ``seed``: of the rows that are drawn from ``read``."""

    repairs: tuple[options.RepairName, ...]
    rotation: options.RotationName | None
    biases: bool
    read: scoring.ReadOptions | None
    trust: bool
    seed: int

    @property
    def before(self) -> bool:
        """Whether the model is changed before it is planned."""
        return self.biases or self.rotation is not None

    @property
    def reads(self) -> bool:
        """Whether it looks at data."""
        return bool(self.repairs) or self.rotation == "residual"

    @property
    def told(self) -> dict[str, Any]:
        """What a plan says of it: the result's weights are not those of the model that was planned."""
        told = {"repair": list(self.repairs), "rotate": self.rotation, "add_biases": self.biases}
        return {name: value for name, value in told.items() if value}

    def check(self) -> None:
        """Raise ``PlanError`` where data is wanted and none is given."""
        if self.reads and self.read is None:
            what = f"--repair {self.repairs[0]}" if self.repairs else "--rotate residual"
            raise PlanError(f"{what} looks at data: give --data FILE")

    def turned(self, loaded: LoadedModel, step: console.Steps) -> tuple[LoadedModel, list[str]]:
        """The same function with biases, or in another basis, and sentences on what that costs."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", CostWarning)
            turned = self._turned(loaded, step)
        return turned, [str(each.message) for each in said if issubclass(each.category, CostWarning)]

    def _turned(self, loaded: LoadedModel, step: console.Steps) -> LoadedModel:
        from shear_tools.api import repairing

        if loaded.config_only and self.rotation is not None:
            raise PlanError(f"{loaded.spec} has no weights, only a config: there is nothing to rotate")
        if self.biases:
            loaded = replace(loaded, model=repairing.with_biases(loaded.model))
        if self.rotation == "heads":
            return replace(loaded, model=repairing.rotate(loaded.model, "heads"))
        if self.rotation is None:
            return loaded
        assert self.read is not None
        data = scoring.batches(loaded, step, self.read, self.trust, self.seed)
        with scoring.on_device(loaded.model, self.read):
            told = scoring.telling(step, "reading")
            model = repairing.rotate(loaded.model, "residual", data=data, progress=told)
        return replace(loaded, model=model.to("cpu"))

    def mended(self, loaded: LoadedModel, plan: Plan, step: console.Steps) -> LoadedModel:
        """The model that ``plan`` takes least from."""
        from shear_tools.api import repairing

        assert self.read is not None
        data = scoring.batches(loaded, step, self.read, self.trust, self.seed)
        with scoring.on_device(loaded.model, self.read):
            told = scoring.telling(step, "reading")
            model = repairing.repair(loaded.model, plan, *self.repairs, data=data, progress=told)
        return replace(loaded, model=model.to("cpu"))
