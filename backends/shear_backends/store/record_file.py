"""The record of a sheared model as a file: what differs from the dense class beside the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from shear_backends.module.attributes import Overrides
from shear_backends.module.fits import Fit
from shear_backends.module.gathers import Gather
from shear_backends.module.rms_norms import RmsNorms
from shear_backends.module.shear import Record
from shear_ir.errors import LoadError
from shear_ir.plans import Plan
from shear_ir.reading import Unreadable, document_in
from shear_ir.writing import write_text
from shear_passes.rewrite.rescale_norm import NormFix

RECORD_FILE = "shear_ir.json"
PLAN_FILE = "plan.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class RecordDocument(_Strict):
    """The file that says how a sheared model came about; the plan lies beside it.

    ``backend``: which one made what lies beside it. ``sheared``: False for a model that came without a record of a cut
    and lies there as its class saves it. ``shapes``: of tensors that were given another size after the cut. ``casts``:
    the precision of buffers that the class computes in another one.
    """

    format: Literal["shear-ir record 1"]
    backend: Literal["module", "graph"] = "module"
    model_class: str
    stock: bool
    config: dict[str, Any] | None
    attributes: dict[str, dict[str, int | list[int]]]
    norms: tuple[NormFix, ...]
    gathers: tuple[Gather, ...]
    fits: tuple[Fit, ...] = ()
    exchanged: list[str] = []
    sheared: bool = True
    shapes: dict[str, list[int]] = {}
    casts: dict[str, str] = {}
    rms_norms: RmsNorms | None = None

    def record(self, plan: Plan) -> Record:
        """The record of the file, with the plan that lies beside it."""
        return Record(
            plan, self.config, self.stock, self.attributes, self.norms, self.gathers, self.fits,
            rms_norms=self.rms_norms,
        )  # fmt: skip


def write_record(folder: Path, document: RecordDocument) -> None:
    """Write the record into ``folder``."""
    write_text(folder / RECORD_FILE, document.model_dump_json(indent=1))


def plain_document(model: nn.Module) -> RecordDocument:
    """The document of a model that came without a record."""
    return RecordDocument(
        format="shear-ir record 1", model_class=type(model).__name__, stock=True, config=None, attributes={}, norms=(),
        gathers=(), sheared=False,
    )  # fmt: skip


def document_of(model: nn.Module, record: Record, exchanged: Sequence[str] = ()) -> RecordDocument:
    """The document of ``record``; ``exchanged``: modules of ``model`` that its forward put in place of others."""
    attributes: Overrides = {path: dict(values) for path, values in record.attributes.items()}
    return RecordDocument(
        format="shear-ir record 1",
        model_class=type(model).__name__,
        stock=record.stock,
        config=_plain(record.config),
        attributes=attributes,
        norms=record.norms,
        gathers=record.gathers,
        fits=record.fits,
        exchanged=list(exchanged),
        rms_norms=record.rms_norms,
    )


def _plain(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A config as JSON types: dtypes as their names, and not where it was read, which is nobody else's business."""
    if config is None:
        return None
    return {
        key: _plain(value) if isinstance(value, dict) else str(value).removeprefix("torch.")
        if isinstance(value, torch.dtype) else value
        for key, value in config.items() if key not in ("_name_or_path", "name_or_path")
    }  # fmt: skip


def require_sheared(folder: Path) -> None:
    """Raise ``LoadError`` unless shear-ir wrote the folder."""
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}")
    if not (folder / RECORD_FILE).is_file():
        raise LoadError(f"{folder} was not written by shear-ir: it holds no {RECORD_FILE}")


def read_record(folder: Path) -> RecordDocument:
    """The record in ``folder``; raises ``LoadError`` when it is damaged."""
    try:
        return document_in(folder / RECORD_FILE, RecordDocument, infinite=True)
    except Unreadable as failure:
        raise LoadError(f"{folder / RECORD_FILE} is damaged: {failure}") from failure
