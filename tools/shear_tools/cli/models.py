"""MODEL on the command line: anything ``load_model`` reads, and what shear-ir wrote itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shear_ir.errors import LoadError
from shear_ir.reading import Unreadable, require_regular

# Files that say which token has which number.
_VOCABULARIES = ("tokenizer.json", "*vocab*", "*.model", "*.tiktoken", "*.spm", "tekken.json")

if TYPE_CHECKING:
    from torch import nn

    from shear_ir.frontend.load import LoadedModel
    from shear_tools.cli.options import Device, Dtype


def open_model(
    spec: str, trust: bool = False, dtype: Dtype | None = None, inputs: Path | None = None, *, weights: bool = True
) -> LoadedModel:
    """The model that ``spec`` names; one of shear-ir's own, or an adapter on it, comes with the record of its cuts.

    ``inputs``: a file of tensors by the names of forward's arguments, which it is traced and compared with from here.
    """
    given = None if inputs is None else _inputs_in(inputs)
    loaded = _open_model(spec, trust, dtype, weights)
    if given is not None:
        from shear_ir.frontend.feeds import remember
        from shear_ir.frontend.inputs import as_inputs

        remember(loaded.model, as_inputs(loaded.model, given))
    return loaded


def _inputs_in(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_regular(path)
        return dict(load_file(path))
    except (OSError, SafetensorError, Unreadable) as failure:
        said = str(failure).partition("\n")[0]
        raise LoadError(f"--inputs {path} is no safetensors file with forward's arguments by name: {said}") from failure


def _open_model(spec: str, trust: bool, dtype: Dtype | None, weights: bool) -> LoadedModel:
    import torch

    from shear_ir.frontend.adapter_files import base_of
    from shear_ir.frontend.files import ADAPTER_CONFIG, SHEARED
    from shear_ir.frontend.load import LoadedModel, load_model

    folder = Path(spec).expanduser()
    wanted = None if dtype is None else getattr(torch, dtype)
    base = Path(base_of(folder)) if (folder / ADAPTER_CONFIG).is_file() else folder
    if not os.path.lexists(base / SHEARED):
        return load_model(spec, trust_remote_code=trust, dtype=wanted, weights=weights)
    loaded = LoadedModel(open_sheared(folder, trust=trust), spec, folder)
    if wanted is not None:
        # Buffers keep theirs, as they do when transformers loads a model.
        for param in loaded.model.parameters():
            param.data = param.data.to(wanted)
    return loaded


def open_sheared(folder: Path, model: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """What shear-ir wrote to ``folder``; ``model``: the dense model, for classes that are not transformers' own."""
    from shear_backends.store import model as store

    return store.load(folder, model, trust_remote_code=trust)


def require_device(device: Device | None) -> None:
    """Raise ``LoadError`` for a GPU that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise LoadError("--device cuda: torch sees no GPU here")


def open_language_model(
    spec: str, trust: bool = False, dtype: Dtype | None = None, device: Device | None = None
) -> tuple[LoadedModel, Any]:
    """The model that ``spec`` names, with weights, where it is to compute, and its tokenizer.

    Raises ``LoadError`` for one without weights or without a tokenizer, and for a GPU that is not there.
    """
    import torch

    require_device(device)
    loaded = open_model(spec, trust, dtype)
    if loaded.config_only or loaded.source is None:
        raise LoadError(f"{spec} has no {'weights' if loaded.config_only else 'folder with a tokenizer'} to work with")
    tokenizer = open_tokenizer(_with_tokenizer(loaded.source), trust)
    # Of the processes that accelerate launches, each has a card of its own.
    card = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    loaded.model.to(card if device != "cpu" and torch.cuda.is_available() else "cpu")
    return loaded, tokenizer


def _with_tokenizer(folder: Path) -> Path:
    """``folder``, or where it holds an adapter without a tokenizer, the folder of its base."""
    from shear_ir.frontend.adapter_files import base_of
    from shear_ir.frontend.files import ADAPTER_CONFIG

    if not (folder / ADAPTER_CONFIG).is_file() or _has_vocabulary(folder):
        return folder
    base = Path(base_of(folder))
    return base if base.is_dir() else folder


def _has_vocabulary(folder: Path) -> bool:
    return any(file for pattern in _VOCABULARIES for file in folder.glob(pattern))


def open_tokenizer(folder: Path, trust: bool = False) -> Any:
    """The tokenizer of a model folder; raises ``LoadError`` where there is none."""
    from transformers import AutoTokenizer

    from shear_ir.frontend.files import require_documents
    from shear_ir.frontend.load import quiet

    require_documents(folder)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        length = getattr(tokenizer, "model_max_length", None)
        if length is not None and (not isinstance(length, int | float) or not length > 0):
            raise LoadError(f"its model_max_length is {length!r}, which is no length")
        return tokenizer
    except Exception as failure:  # whatever stock code raises, the answer is that it does not load
        if not _has_vocabulary(folder):
            raise LoadError(
                f"{folder} holds no tokenizer: save the one that the model was trained with there (save_pretrained)"
            ) from failure
        said = " ".join(str(failure).split()) or type(failure).__name__
        raise LoadError(f"the tokenizer in {folder} cannot be read: {said}") from failure
