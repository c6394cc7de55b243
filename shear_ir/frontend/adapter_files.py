"""Adapters on disk: PEFT's own folder, with a note of the base they were made for, which is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import nn

from shear_ir.errors import LoadError
from shear_ir.frontend.base import base_digest
from shear_ir.frontend.files import (
    ADAPTER_CONFIG,
    ADAPTER_NOTE,
    ADAPTER_WEIGHTS,
    CONFIG,
    HUB_ID,
    read_header,
    read_json,
    refuse_other_weights,
)
from shear_ir.frontend.sentences import failures, quiet
from shear_ir.limits import bounded
from shear_ir.reading import Unreadable, document_in
from shear_ir.writing import write_text

# Starts of PEFT that move a part of the base's weights into the adapter, by the first letters of their names.
_MOVING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
# Those of them that PEFT does not make again when it loads: drawn at random, or from data that no file holds.
_UNREPEATABLE = ("pissa_niter_", "corda", "lora_ga")


class AdapterNote(BaseModel):
    """What lies beside an adapter: ``base_digest`` of the base it was made for, and where that was, seen from here.

    PEFT knows no path that moves with the folder, and loads an adapter of another base without a word.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["shear-ir adapter 1"] = "shear-ir adapter 1"
    base_digest: str = Field(pattern=r"^[0-9a-f]{16}$")
    base: str = ""

    def save(self, folder: Path) -> None:
        """Write the note into the adapter's folder."""
        write_text(folder / ADAPTER_NOTE, self.model_dump_json(indent=1) + "\n")


def read_note(folder: Path) -> AdapterNote | None:
    """The note in an adapter's folder; None when there is none, as for adapters that PEFT saved."""
    path = folder / ADAPTER_NOTE
    if not path.exists():
        return None
    try:
        return document_in(path, AdapterNote)
    except Unreadable as failure:
        raise LoadError(f"{path} is damaged: {failure}") from failure


def base_of(folder: Path) -> str:
    """The base of the adapter in ``folder``: the one beside it that its note names, or the one its config names.

    A folder or a name on the hub, and never ``module:factory``: whoever wrote the adapter chooses no code to run.
    """
    note = read_note(folder)
    if note is not None and note.base and (folder / note.base / CONFIG).is_file():
        return str((folder / note.base).resolve())
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise LoadError(f"{folder / ADAPTER_CONFIG} does not name its base model (base_model_name_or_path)")
    if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
        raise LoadError(f"the base model of {folder} cannot be loaded: there is no folder {base}")
    if (Path(base) / ADAPTER_CONFIG).exists():
        raise LoadError(f"the base model of {folder} is {base}, which is an adapter itself")
    return base


def moving_start(folder: Path) -> str:
    """How the adapter in ``folder`` started, where that changed the weights of its base; empty for all other starts.

    Such an adapter belongs to the base as it left it, not to the one that its config names.
    """
    start = _start(folder)
    return next((said for name, said in _MOVING.items() if start.startswith(name)), "")


def _require_repeatable(folder: Path) -> None:
    """Raise ``LoadError`` for an adapter whose start PEFT does not make again, and so would load on another base."""
    start = _start(folder)
    if start.startswith(_UNREPEATABLE):
        raise LoadError(
            f"the adapter {folder} started by changing its base (init_lora_weights {start!r}), and that start cannot "
            "be made again: save it as plain LoRA (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or, where the changed base was saved, set it to true in "
            f"{ADAPTER_CONFIG}"
        )


def _refuse_code(folder: Path) -> None:
    """Raise ``LoadError`` for an adapter that has PEFT import a module by the name that its config gives."""
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("megatron_config") is not None:
        raise LoadError(
            f"{folder / ADAPTER_CONFIG} names code to import (megatron_core), which a file does not choose: remove "
            "megatron_config from it"
        )


def _require_patterns(model: nn.Module, folder: Path) -> None:
    """Raise ``LoadError`` for a regular expression of the adapter that is none, or takes longer than one may."""
    config = read_json(folder / ADAPTER_CONFIG)
    whole = [config.get(name) for name in ("target_modules", "exclude_modules")]
    keys = [key for name in ("rank_pattern", "alpha_pattern") for key in config.get(name) or ()]
    patterns = [one for one in whole if isinstance(one, str)] + [rf"(.*\.)?({key})$" for key in keys]
    names = [name for name, _ in model.named_modules()] if patterns else []
    with bounded(f"a pattern in {folder / ADAPTER_CONFIG}"):
        for pattern in patterns:
            try:
                asked = re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as failure:
                raise LoadError(f"{folder / ADAPTER_CONFIG}: {pattern[:80]!r} is no pattern: {failure}") from failure
            for name in names:
                asked.fullmatch(name)


def _start(folder: Path) -> str:
    return str(read_json(folder / ADAPTER_CONFIG).get("init_lora_weights")).lower()


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """``model`` with the adapter in ``folder``, in evaluation mode: a PEFT model, or that one with one more.

    A second adapter is loaded, not activated. Raises ``LoadError`` when the adapter carries the digest of a base of
    other shapes, does not fit, where PEFT alone would leave it without effect, or changed its base when it started in a
    way that cannot be repeated.
    """
    folder = Path(folder)
    names = adapter_tensors(folder)
    _require_repeatable(folder)
    _refuse_code(folder)
    _require_patterns(model, folder)
    note = read_note(folder)
    if note is not None and (mine := base_digest(model)) != note.base_digest:
        raise LoadError(
            f"the adapter {folder} was made for another base: the shapes of that one have the digest "
            f"{note.base_digest}, those of this {type(model).__name__} {mine}"
        )
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as failure:
        raise LoadError(f"{folder} is an adapter, which peft loads: pip install 'shear-ir[peft]'") from failure
    with quiet(), failures(f"the adapter {folder} does not fit its base model"):
        options: Any = {"adapter_name": name, "autocast_adapter_dtype": _single(folder)}
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), **options)
            peft_model = model
        else:
            peft_model = PeftModel.from_pretrained(model, str(folder), **options)
        # PEFT itself only warns, and an adapter that was not loaded does silently nothing.
        wanted = set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    for tensor in sorted(wanted - names):
        raise LoadError(f"{folder / ADAPTER_WEIGHTS} lacks the tensor {tensor}")
    for tensor in sorted(names - wanted - set(peft_model.state_dict())):
        raise LoadError(f"{folder / ADAPTER_WEIGHTS} holds the tensor {tensor}, for which the model has no place")
    assert isinstance(peft_model, nn.Module)
    return peft_model.eval()


def adapter_tensors(folder: Path) -> frozenset[str]:
    """The names of the tensors of the adapter in ``folder``; raises ``LoadError`` when it is not safetensors."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise LoadError(f"{folder} holds no {ADAPTER_CONFIG}")
    if not (folder / ADAPTER_WEIGHTS).exists():
        refuse_other_weights(folder, ADAPTER_WEIGHTS)
        raise LoadError(f"{folder} has no {ADAPTER_WEIGHTS}")
    return read_header(folder / ADAPTER_WEIGHTS)


def _single(folder: Path) -> bool:
    """Whether the adapter was saved in single precision, which PEFT keeps on a base of half precision if told to."""
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return any(file.get_slice(name).get_dtype() not in ("F16", "BF16") for name in file.keys())  # noqa: SIM118  # no dict
    except (SafetensorError, OSError) as failure:
        raise LoadError(f"{path} is not a whole safetensors file: {failure}") from failure
