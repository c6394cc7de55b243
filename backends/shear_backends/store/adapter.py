"""The adapters of a saved PEFT model: one folder each, as PEFT itself writes and reads them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from shear_backends.module.adapters import forget_start
from shear_ir.errors import LoadError, SaveError
from shear_ir.frontend.adapter_files import AdapterNote, load_adapter
from shear_ir.frontend.base import base_digest
from shear_ir.frontend.files import ADAPTER_WEIGHTS
from shear_ir.frontend.sentences import quiet
from shear_ir.reading import Unreadable, document_in
from shear_ir.writing import write_text

ADAPTERS = "adapters"
"""The folder of a saved model that holds one folder for each adapter."""
_INDEX = "shear_ir_adapters.json"
_NAME = re.compile(r"[\w -]+")


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["shear-ir adapters 1"] = "shear-ir adapters 1"
    names: list[str]
    active: list[str]


def write_adapters(model: nn.Module, folder: Path) -> None:
    """Write every adapter of a PEFT model under ``folder``."""
    from peft import get_peft_model_state_dict

    configs: dict[str, Any] = dict(model.peft_config)  # type: ignore[arg-type]
    digest = base_digest(model)
    for name, config in configs.items():
        if not _NAME.fullmatch(name):
            raise SaveError(f"the adapter name {name!r} cannot name a folder: rename the adapter")
        with quiet():
            tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        note = AdapterNote(base_digest=digest, base="../..")
        write_adapter(folder / ADAPTERS / name, tensors, config, note)
    index = _Index(names=list(configs), active=list(model.active_adapters))  # type: ignore[arg-type]
    write_text(folder / ADAPTERS / _INDEX, index.model_dump_json(indent=1) + "\n")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: Any, note: AdapterNote) -> None:
    """Write one adapter: ``tensors`` under PEFT's names, its config, and the note of its base, seen from there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.detach().contiguous().clone() for n, t in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    written = copy.deepcopy(config)
    written.base_model_name_or_path = note.base
    written.inference_mode = True
    forget_start(written)
    for field, value in vars(written).items():
        if isinstance(value, set):
            setattr(written, field, sorted(value))
    written.save_pretrained(str(folder))
    note.save(folder)


def has_saved_adapters(folder: Path) -> bool:
    """Whether ``folder`` holds a base with adapters."""
    return (folder / ADAPTERS / _INDEX).is_file()


def with_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """``base`` with all adapters that were saved under ``folder``, the active ones active; nothing is trainable.

    Raises ``LoadError`` when they are damaged or made for another base.
    """
    path = folder / ADAPTERS / _INDEX
    try:
        index = document_in(path, _Index)
    except Unreadable as failure:
        raise LoadError(f"{path} is damaged: {failure}") from failure
    if (
        not index.names
        or not all(_NAME.fullmatch(name) for name in index.names)
        or set(index.active) - set(index.names)
    ):
        raise LoadError(f"{path} is damaged: it names adapters that cannot be there")
    model = base
    for name in index.names:
        model = load_adapter(model, folder / ADAPTERS / name, name)
    _activate(model, index.active)
    return model


def same_active(model: nn.Module, folder: Path, base: nn.Module) -> nn.Module:
    """``base`` with the adapters under ``folder`` loaded by PEFT alone, those active that are active in ``model``."""
    from peft import PeftModel

    names: list[str] = list(model.peft_config)  # type: ignore[arg-type]
    halves = all(p.dtype in (torch.float16, torch.bfloat16) for n, p in model.named_parameters() if "lora_" in n)
    options: Any = {"autocast_adapter_dtype": not halves}
    first, *others = names
    loaded = PeftModel.from_pretrained(base, str(folder / ADAPTERS / first), adapter_name=first, **options)
    for name in others:
        loaded.load_adapter(str(folder / ADAPTERS / name), name, **options)
    _activate(loaded, list(model.active_adapters))  # type: ignore[arg-type]
    assert isinstance(loaded, nn.Module)
    return loaded.eval()


def _activate(model: Any, names: list[str]) -> None:
    if len(names) == 1:
        model.set_adapter(names[0])
    elif names:
        model.base_model.set_adapter(names)
    model.requires_grad_(False)
