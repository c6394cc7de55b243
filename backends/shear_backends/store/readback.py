"""Read back before publishing: a folder is loaded again from disk, and compared with the model it was written from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.shear import RECORD, Record, of_transformers
from shear_backends.store.adapter import same_active, with_adapters
from shear_backends.store.rebuild import exchanged_modules, hollow, rebuilt, shards
from shear_backends.store.record_file import PLAN_FILE, RecordDocument, document_of, read_record, write_record
from shear_backends.store.reread import (
    cast,
    casts,
    different_settings,
    different_shapes,
    different_tensor,
    said_setting,
)
from shear_backends.verify.numbers import difference, evaluation, run
from shear_backends.verify.structure import first_difference
from shear_ir.errors import SaveError, ShearError
from shear_ir.frontend.export import trace
from shear_ir.frontend.feeds import inputs_of, with_tensors
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.load import quiet
from shear_ir.frontend.sentences import sentence
from shear_ir.plans import Plan
from shear_passes.rewrite.raise_lora import raise_lora

_PLACES = 1024
"""How many units in the last place two runs of one function may lie apart, relative to its largest output."""


@dataclass(frozen=True)
class Verdict:
    """Whether what was read again is the model that was written. ``note``: why not, or the cast that has to follow;
    ``casts``: the buffers that the class computes in another precision."""

    stock: bool
    note: str = ""
    casts: Mapping[str, str] = field(default_factory=dict)


def stock_verdict(model: nn.Module, folder: Path) -> Verdict:
    """Whether the stock class of ``model`` alone makes the same model of ``folder``."""
    try:
        again, lacking = _by_class(model, folder)
    except Exception as failure:  # whatever stock code raises, the answer is that stock code does not load it
        return Verdict(False, f"{type(failure).__name__}: {sentence(failure)}")
    kinds = casts(model, again)
    cast(again, kinds)
    why = different_tensor(model, again, shards(folder)) or _other_function(model, again)
    if why and lacking:
        why = f"its class makes {lacking} anew, of which no file tells"
    return Verdict(False, why) if why else Verdict(True, _said(kinds), kinds)


def adapted_verdict(model: nn.Module, dense: nn.Module, folder: Path, verdict: Verdict) -> Verdict:
    """``verdict`` on the base of a PEFT model, ``dense``, joined with what its adapters under ``folder`` are read as.

    Raises ``SaveError`` where they are not read as they are.
    """
    try:
        with quiet():
            if verdict.stock:
                again = same_active(model, folder, _by_class(dense, folder)[0])
            else:
                document = read_record(folder)
                record = document.record(Plan.load(folder / PLAN_FILE))
                again = with_adapters(rebuilt(folder, document, record, vars(dense)[RECORD].skeleton), folder)
    except Exception as failure:  # PEFT's code or that of the model
        raise SaveError(
            f"the adapters of this {type(dense).__name__} cannot be saved so that they load again: {sentence(failure)}"
        ) from failure
    cast(again, {f"base_model.model.{name}": kind for name, kind in verdict.casts.items()})
    why = different_tensor(model, again, {}) or _other_function(model, again)
    if why:
        raise SaveError(f"the adapters of this {type(dense).__name__} would not be loaded as they are: {why}")
    return verdict


def require_readable(model: nn.Module, folder: Path, record: Record, verdict: Verdict) -> None:
    """Write the record of ``model``, with what has changed since its cut, and read the folder again.

    Raises ``SaveError`` where ``shear_ir.load`` would make another model of it.
    """
    document = document_of(model, record, () if record.stock else exchanged_modules(model, folder, record))
    document.casts = dict(verdict.casts)
    write_record(folder, document)
    if record.stock:
        return
    dense = record.skeleton
    try:
        if dense is None and not of_transformers(model):
            # Only whoever gives the dense model to ``load`` can build it: the files are all that can be compared.
            why = different_tensor(model, model, shards(folder))
        else:
            _tell_today(model, folder, record, document, dense)
            why = _read_again(model, folder, dense)
    except ShearError as failure:
        why = str(failure).replace(f"{folder}/", "").replace(str(folder), "the folder")
    if why:
        raise SaveError(
            f"{type(model).__name__} cannot be saved so that it loads again, since it was changed after it was "
            f"sheared: {why}; undo that, give the config the sizes that are there, or leave it to a plan"
        )


def _tell_today(
    model: nn.Module, folder: Path, record: Record, document: RecordDocument, dense: nn.Module | None
) -> None:
    """Write into the record which sizes are other ones than those that the cut left."""
    bare = hollow(folder, document, record, dense)
    own, theirs = named_tensors(model), named_tensors(bare)
    for name in [n for n in theirs if n not in own]:
        raise SaveError(f"{name} is gone")
    for name in [n for n in own if n not in theirs]:
        raise SaveError(f"{name} is new")
    document.shapes = {name: list(shape) for name, shape in different_shapes(model, bare).items()}
    document.casts = casts(model, bare)
    for path, names in different_settings(model, bare).items():
        for name in names:
            mine, made = (getattr(of.get_submodule(path), name, None) for of in (model, bare))
            if _is_size(mine) and _is_size(made) and not name.startswith("_"):
                told = list(mine) if isinstance(mine, (tuple, list)) else mine
                document.attributes.setdefault(path, {})[name] = told  # type: ignore[assignment]
    write_record(folder, document)


def _read_again(model: nn.Module, folder: Path, dense: nn.Module | None) -> str:
    document = read_record(folder)
    record = document.record(Plan.load(folder / PLAN_FILE))
    again = rebuilt(folder, document, record, dense, weights=False)
    why = different_tensor(model, again, shards(folder))
    if why or not different_settings(model, again):
        return why
    return _other_function(model, rebuilt(folder, document, record, dense))


def _other_function(model: nn.Module, again: nn.Module) -> str:
    """Why two models over equal tensors compute two functions; empty where they do not."""
    settings = different_settings(model, again)
    if not settings:
        return ""
    said = said_setting(settings, model, again)
    try:
        feed = inputs_of(model)
        if not first_difference(*(raise_lora(trace(each, feed)) for each in (model, again))):
            return ""
        gap, scale, eps = _gap(model, again, feed)
    except Exception as failure:  # the model's own code
        return f"{said}, and it does not run on example inputs ({sentence(failure)})"
    return "" if gap <= _PLACES * eps * scale else f"the outputs differ by {gap:.3g} ({said})"


def _gap(model: nn.Module, again: nn.Module, feed: Inputs) -> tuple[float, float, float]:
    """The difference of the outputs in float32 at least, the largest output, and the precision."""
    halves = (torch.bfloat16, torch.float16)
    found = []
    for each in (model, again):
        if any(t.dtype in halves for t in named_tensors(each).values()):
            each = copy.deepcopy(each).float()
        each_feed = with_tensors(feed, lambda t: t.float() if t.dtype in halves else t)
        where = next(iter(named_tensors(model).values())).device
        with evaluation(each), torch.no_grad():
            found.append(run(each.to(where), each_feed))
    scale = max([1.0, *(float(t.abs().max()) for t in found[0] if t.numel())])
    eps = max(torch.finfo(t.dtype).eps for t in found[0] if t.is_floating_point())
    return difference(found[0], found[1]), scale, eps


def _by_class(model: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    """What ``from_pretrained`` makes of the folder, and the first tensor that no file gave it."""
    kind: Any = type(model)
    with quiet():
        again, report = kind.from_pretrained(folder, output_loading_info=True, **_loading(model))
    return again.eval(), min(report["missing_keys"], default="")


def _loading(model: nn.Module) -> dict[str, Any]:
    """What a reader may choose without changing the function: the dtype, the attention and the experts' product."""
    config: Any = model.config
    chosen = {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
    return {"dtype": next(model.parameters()).dtype, **{name: value for name, value in chosen.items() if value}}


def _said(kinds: Mapping[str, str]) -> str:
    """No file holds computed buffers: whoever loads the model makes them anew, in full precision."""
    for name, kind in kinds.items():
        return (
            f"computed buffers such as {name.rpartition('.')[2]} were cast: from_pretrained(path).to(torch.{kind}) "
            "gives the same outputs, from_pretrained(path) alone keeps them in full precision"
        )
    return ""


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
