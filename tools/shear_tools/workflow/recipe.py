"""The options of a whole run, as a file that people edit: ``recipe.yaml`` has a section per stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shear_ir.errors import LoadError, PlanError, ShearError
from shear_passes.importance.names import imports
from shear_training.data_config import yaml_in
from shear_training.knowledge import RATIOS
from shear_training.pruning import Pruning
from shear_training.rounds import on_cpu
from shear_training.settings import Recovery


@dataclass(frozen=True)
class KnowledgeOptions:
    """How the knowledge distribution is measured. Raises ``PlanError`` for a bad value.

    ``ratios``: shares of a group that are masked; ``freeze``: share of the groups that stay whole, the most sensitive;
    ``rows``: rows of every source to measure on, of those to train on, for what is held out is not looked at.
    ``allocate``: the groups that are not frozen lose what costs least by the same measurements, instead of the same
    share.
    """

    ratios: tuple[float, ...] = RATIOS
    freeze: float = 0.1
    rows: int = 32
    allocate: bool = False

    def __post_init__(self) -> None:
        if not self.ratios:
            raise PlanError("there is at least one ratio to measure at")
        for ratio in self.ratios:
            if not 0.0 < ratio < 1.0:
                raise PlanError(f"a ratio is a share of a group between 0 and 1, not {ratio}")
        if not 0.0 <= self.freeze <= 1.0:
            raise PlanError(f"the share of groups to freeze is between 0 and 1, not {self.freeze}")
        if self.rows < 1:
            raise PlanError(f"rows to measure on are a number from 1 up, not {self.rows}")


@dataclass(frozen=True)
class Recipe:
    """``knowledge``, ``pruning`` and ``recovery`` are the options of the stages; ``stages``: those that differ for a
    stage of ``data.yaml``, by its name."""

    knowledge: KnowledgeOptions = field(default_factory=KnowledgeOptions)
    pruning: Pruning = field(default_factory=Pruning)
    recovery: Recovery = field(default_factory=Recovery)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.knowledge.allocate and self.pruning.compete:
            raise PlanError(
                "layers share by what was measured (knowledge.allocate) or by rank (pruning.compete): not both"
            )

    @property
    def allocation(self) -> str:
        """How layers share what goes, as ``shear_ir.plan`` names it."""
        return "by-knowledge" if self.knowledge.allocate else "isomorphic" if self.pruning.compete else "uniform"

    def stage(self, name: str) -> Recovery:
        """The options of the recovery stage ``name``."""
        return replace(self.recovery, **self.stages.get(name, {}))

    def with_options(self, **options: Any) -> Recipe:
        """The same with options of every training stage, such as ``seed`` and ``device``; None changes nothing."""
        given = {name: value for name, value in options.items() if value is not None}
        return replace(self, pruning=replace(self.pruning, **given), recovery=replace(self.recovery, **given))

    def require_devices(self) -> None:
        """Raise ``PlanError`` for a GPU that is asked for and not there."""
        for device in (self.pruning.device, self.recovery.device, *(self.stage(name).device for name in self.stages)):
            on_cpu(device)

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def load_recipe(path: str | Path, *, trust_remote_code: bool = False) -> Recipe:
    """Read a recipe; raises ``LoadError`` with the place and the reason.

    ``trust_remote_code``: criteria may be import paths, whose code then runs.
    """
    read = yaml_in(Path(path), "the recipe") or {}
    if not isinstance(read, dict):
        raise LoadError(f"{path} must be a mapping with sections such as pruning and recovery")
    sections = {f.name for f in fields(Recipe)}
    for section in read:
        if section not in sections:
            raise LoadError(f"{path} has a section {section}; a recipe has {', '.join(sorted(sections))}")
    if not trust_remote_code:
        _refuse_code(path, read.get("pruning"))
    parts = (
        _section(path, "knowledge", KnowledgeOptions, read), _section(path, "pruning", Pruning, read),
        _section(path, "recovery", Recovery, read),
    )  # fmt: skip
    try:
        made = Recipe(*parts)
    except PlanError as failure:
        raise LoadError(f"{path}: {failure}") from failure
    stages = _mapping(path, "stages", read.get("stages"))
    return replace(made, stages={name: _stage(path, name, made.recovery, stages[name]) for name in stages})


def _refuse_code(path: str | Path, pruning: Any) -> None:
    criteria = pruning.get("criteria") if isinstance(pruning, dict) else None
    for name in criteria if isinstance(criteria, dict) else ():
        if isinstance(name, str) and imports(name):
            raise LoadError(
                f"{path}: pruning.criteria names {name}, code that runs only if you trust it: trust_remote_code"
            )


def _section(path: str | Path, name: str, kind: type[Any], read: Mapping[str, Any]) -> Any:
    return _options(path, name, kind, _mapping(path, name, read.get(name)))


def _stage(path: str | Path, name: str, common: Recovery, given: Any) -> dict[str, Any]:
    """The options of one stage that differ, as the types that they are in ``Recovery``."""
    options = _mapping(path, f"stages.{name}", given)
    made = _options(path, f"stages.{name}", Recovery, {**asdict(common), **options})
    return {option: getattr(made, option) for option in options}


def _mapping(path: str | Path, name: str, options: Any) -> Mapping[str, Any]:
    if options is None:  # a section with nothing below it
        return {}
    if not isinstance(options, dict):
        raise LoadError(f"{path}: {name} must be a mapping of options")
    return options


def _options(path: str | Path, name: str, kind: type[Any], options: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    for option in options:
        if option not in known:
            raise LoadError(f"{path}: {name} has no option {option}; it has {', '.join(sorted(known))}")
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as failure:
        first = failure.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LoadError(f"{path}: {name}.{place}: {first['msg']}") from failure
    except ShearError as failure:
        raise LoadError(f"{path}: {name}: {failure}") from failure
