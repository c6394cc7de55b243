"""The record of a sheared model as a file: what differs from the dense class beside the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from shear_backends.attributes import Overrides
from shear_backends.fits import Fit
from shear_backends.gathers import Gather
from shear_backends.module import Record
from shear_ir.errors import LoadError
from shear_ir.plans import Plan, write_text
from shear_passes.rewrite.rescale_norm import NormFix

RECORD_FILE = "shear_ir.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class _NormDocument(_Strict):
    module: str
    eps: float | None
    parameter: str
    offset: float
    factor: float
    power: float = 0.5


class _GatherDocument(_Strict):
    module: str
    argument: str | int
    dim: int
    period: int
    kept: list[int]


class _FitDocument(_Strict):
    module: str
    rank: int
    places: tuple[int, ...]
    old: tuple[int, ...]
    new: tuple[int, ...]
    operand: tuple[int, ...] = ()


class RecordDocument(_Strict):
    """The file that says how a sheared model came about; the plan lies beside it."""

    format: Literal["shear-ir record 1"]
    model_class: str
    stock: bool
    config: dict[str, Any] | None
    attributes: dict[str, dict[str, int | list[int]]]
    norms: list[_NormDocument]
    gathers: list[_GatherDocument]
    fits: list[_FitDocument] = []
    exchanged: list[str] = []

    def record(self, plan: Plan) -> Record:
        """The record of the file, with the plan that lies beside it."""
        return Record(
            plan, self.config, self.stock, self.attributes,
            tuple(NormFix(**n.model_dump()) for n in self.norms),
            tuple(Gather(**{**g.model_dump(), "kept": tuple(g.kept)}) for g in self.gathers),
            tuple(Fit(**f.model_dump()) for f in self.fits),
        )  # fmt: skip


def write_record(folder: Path, model: nn.Module, record: Record, exchanged: Sequence[str] = ()) -> None:
    """Write the record of ``model`` into ``folder``; ``exchanged``: modules that its forward put in place of others."""
    attributes: Overrides = {path: dict(values) for path, values in record.attributes.items()}
    document = RecordDocument(
        format="shear-ir record 1",
        model_class=type(model).__name__,
        stock=record.stock,
        config=_plain(record.config),
        attributes=attributes,
        norms=[_NormDocument(**asdict(n)) for n in record.norms],
        gathers=[_GatherDocument(**{**asdict(g), "kept": list(g.kept)}) for g in record.gathers],
        fits=[_FitDocument(**asdict(f)) for f in record.fits],
        exchanged=list(exchanged),
    )
    write_text(folder / RECORD_FILE, document.model_dump_json(indent=1))


def _plain(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A config as JSON types: dtypes as their names."""
    if config is None:
        return None
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in config.items()}


def require_sheared(folder: Path) -> None:
    """Raise ``LoadError`` unless shear-ir wrote the folder."""
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}")
    if not (folder / RECORD_FILE).is_file():
        raise LoadError(f"{folder} was not written by shear-ir: it holds no {RECORD_FILE}")


def read_record(folder: Path) -> RecordDocument:
    """The record in ``folder``; raises ``LoadError`` when it is damaged."""
    try:
        return RecordDocument.model_validate_json((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as failure:
        raise LoadError(f"{folder / RECORD_FILE} is damaged: {str(failure).splitlines()[0]}") from failure
