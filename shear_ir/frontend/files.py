"""The files of a model folder, checked before anything is loaded from them: safetensors and JSON, never pickle."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shear_ir.errors import LoadError
from shear_ir.reading import DOCUMENT, Unreadable, contains, json_in, require_regular

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NOTE = "shear_ir_adapter.json"
SHEARED = "shear_ir.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Weights in any other form; none of them is read. ``training_args.bin`` and the like are no weights.
_DOCUMENTS = (
    GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "tokenizer.json", "processor_config.json", "preprocessor_config.json", "chat_template.json", ADAPTER_CONFIG,
)  # fmt: skip
_SMALL = 2**20
_LARGEST = 64 * 2**20
_OTHER_WEIGHTS = ("*model*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.safetensors")


@dataclass(frozen=True)
class ModelFiles:
    """What a checked folder holds: its JSON documents, and tensor names by shard (empty: a config alone)."""

    folder: Path
    config: dict[str, Any]
    shards: dict[Path, frozenset[str]]

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors in the shards."""
        return frozenset().union(*self.shards.values())


def read_files(folder: Path) -> ModelFiles:
    """The checked files of a model folder; raises ``LoadError`` naming the first file that cannot be used."""
    config = read_json(folder / CONFIG)
    if os.path.lexists(folder / GENERATION):
        read_json(folder / GENERATION)
    named = config.get("transformers_weights")
    if named not in (None, WEIGHTS, INDEX):
        raise LoadError(f"{folder / CONFIG} names the weights {named!r}: only {WEIGHTS} and {INDEX} are read")
    if (folder / WEIGHTS).exists():
        return ModelFiles(folder, config, {folder / WEIGHTS: read_header(folder / WEIGHTS)})
    if (folder / INDEX).exists():
        return ModelFiles(folder, config, _sharded(folder))
    refuse_other_weights(folder, WEIGHTS)
    return ModelFiles(folder, config, {})


def require_documents(folder: Path) -> None:
    """Raise ``LoadError`` for a JSON file of a model or tokenizer that foreign code would stumble over."""
    for name in _DOCUMENTS:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            # A vocabulary is large, and read by code that bounds itself.
            if path.exists() and path.stat().st_size > _SMALL:
                require_regular(path, DOCUMENT)
            else:
                json_in(path, infinite=True)
        except (OSError, Unreadable) as failure:
            raise LoadError(f"{path} cannot be read: {failure}") from failure


def is_sheared(folder: str | Path) -> bool:
    """Whether shear-ir saved ``folder`` with layers no stock config can say, so that only its own loader reads it."""
    path = Path(folder) / SHEARED
    return path.is_file() and read_json(path).get("stock") is False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises ``LoadError`` when it is none. Numbers of a config may be infinite."""
    try:
        document = json_in(path, _LARGEST, infinite=path.name != ADAPTER_CONFIG)
    except Unreadable as failure:
        raise LoadError(f"{path} is not JSON: {failure}") from failure
    if not isinstance(document, dict):
        raise LoadError(f"{path} is not a JSON object")
    return document


def read_header(path: Path) -> frozenset[str]:
    """The tensor names in a safetensors file, whose header and extent are checked and whose data is not read."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError, Unreadable) as failure:
        raise LoadError(f"{path} is not a whole safetensors file: {failure}") from failure


def shapes_in(shards: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in safetensors files, whose data is not read."""
    found: dict[str, tuple[int, ...]] = {}
    for path in shards:
        try:
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
        except (SafetensorError, OSError) as failure:
            raise LoadError(f"{path} is not a whole safetensors file: {failure}") from failure
    return found


def refuse_kernels(config: Any, path: Path) -> None:
    """Raise ``LoadError`` for a config that has transformers fetch compiled code from the hub (``owner/kernel``)."""
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in inner:
        named = value.values() if isinstance(value, dict) else [value]
        if "_implementation" in str(key) and any(isinstance(name, str) and "/" in name for name in named):
            raise LoadError(f"{path}: {key} names a kernel, code that runs only if you trust it: trust_remote_code")
        refuse_kernels(value, path)


def refuse_other_weights(folder: Path, wanted: str) -> None:
    """Raise ``LoadError`` when the folder holds weights in a form that is not read."""
    for path in sorted(path for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)):
        if path.suffix == ".safetensors":
            raise LoadError(f"{path} is there, but neither {wanted} nor an index that names it")
        raise LoadError(f"{path} is not safetensors, and other weights are not read: save the model as {wanted} first")


def _sharded(folder: Path) -> dict[Path, frozenset[str]]:
    index = folder / INDEX
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise LoadError(f"{index} has no weight_map from tensor names to file names")
    shards = {name: _shard(index, name) for name in dict.fromkeys(shard_of.values())}
    held = {name: read_header(path) for name, path in shards.items()}
    for tensor, name in shard_of.items():
        if tensor not in held[name]:
            raise LoadError(f"{index} says that {name} holds {tensor}, which it does not")
    return {path: held[name] for name, path in shards.items()}


def _shard(index: Path, name: str) -> Path:
    path = index.parent / name
    if not contains(index.parent, path) or ".." in Path(name).parts or Path(name).is_absolute():
        raise LoadError(f"{index} names the shard {name}, which lies outside of the folder")
    if not path.is_file():
        raise LoadError(f"{index} names the shard {name}, which is not there")
    return path
