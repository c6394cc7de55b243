"""A model by name: a local folder, a folder with only a config, a hub id, or ``package.module:factory``."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shear_ir.errors import LoadError
from shear_ir.frontend.adapter_files import adapter_tensors, base_of, load_adapter
from shear_ir.frontend.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    HUB_ID,
    INDEX,
    WEIGHTS,
    ModelFiles,
    is_sheared,
    read_files,
    refuse_kernels,
    shapes_in,
)
from shear_ir.frontend.quantised import quantised_config, quantised_module
from shear_ir.frontend.sentences import failures, quiet, sentence

# BERT and BART are causal models too, if their config says so; the base model, without a head, is the last resort.
_AUTO_CLASSES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)

_MOST_LAYERS = 4096
_ROOM = 4
"""Times the numbers of the weights that a model may have: shared ones are saved once."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from.

    ``source``: the folder whose tokenizer and other files belong to the model, None for a factory. ``config_only``:
    the model is on the meta device, without weights. ``unused``: tensors of the checkpoint for parts, such as a second
    head, that the model's class does not have.
    """

    model: nn.Module
    spec: str
    source: Path | None = None
    config_only: bool = False
    unused: tuple[str, ...] = ()


def load_model(
    spec: str, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None, weights: bool = True
) -> LoadedModel:
    """The model that ``spec`` names, in evaluation mode, on the CPU or, from a config alone, on the meta device.

    ``dtype``: that of the weights; as saved when None. ``weights``: False for the meta device even where there are
    weights, which are then neither read nor fetched. Raises ``LoadError`` with one sentence about what is wrong.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return _from_folder(spec, folder, trust_remote_code, dtype, weights)
    if folder.exists():
        raise LoadError(f"{spec} is a file: give the folder that holds the model's {CONFIG}")
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", spec):
        return _from_factory(spec, dtype)
    if not HUB_ID.fullmatch(spec):
        raise LoadError(f"there is no folder {spec}")
    snapshot = _download(spec, trust_remote_code, weights)
    return replace(_from_folder(spec, snapshot, trust_remote_code, dtype, weights), spec=spec)


def _from_folder(spec: str, folder: Path, trust: bool, dtype: torch.dtype | None, weights: bool = True) -> LoadedModel:
    if (folder / ADAPTER_CONFIG).exists():
        return _from_adapter(spec, folder, trust, dtype)
    if not (folder / CONFIG).exists():
        raise LoadError(f"{folder} holds neither {CONFIG} nor {ADAPTER_CONFIG}")
    files = read_files(folder)
    if not trust:
        refuse_kernels(files.config, files.folder / CONFIG)
    packed = quantised_config(files.config)
    if packed and weights:
        raise LoadError(
            f"{folder} is quantised ({packed}), and packed weights cannot be cut: give the unquantised model"
        )
    with quiet():
        config = _config(files, trust)
        _require_layers(files, config)
        cls = _model_class(files, config, trust)
        if not files.shards or not weights:
            return LoadedModel(_on_meta(folder, cls, config, dtype), spec, folder, config_only=True)
        model, unused = _pretrained(folder, files.shards, cls, config, trust, dtype)
    require_finite(model, str(folder))
    return LoadedModel(model, spec, folder, unused=unused)


def _config(files: ModelFiles, trust: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if files.config.get("auto_map") and files.config.get("model_type") not in CONFIG_MAPPING and not trust:
        raise LoadError(f"{files.folder} brings its own code, which runs only if you trust it: trust_remote_code")
    with failures(f"{files.folder / CONFIG} cannot be used"):
        return AutoConfig.from_pretrained(files.folder, trust_remote_code=trust)


def _require_layers(files: ModelFiles, config: Any) -> None:
    """Raise ``LoadError`` for a config of more layers than the weights can hold, before any of them is built."""
    most = len(files.tensors) if files.shards else _MOST_LAYERS
    left = [config]
    while left:
        at = left.pop()
        for layers in (getattr(at, "num_hidden_layers", None), getattr(at, "num_layers", None)):
            if isinstance(layers, int) and layers > most:
                held = f"its weights are {most} tensors" if files.shards else f"no model has more than {most:,}"
                raise LoadError(f"{files.folder / CONFIG} says {layers:,} layers, but {held}")
        left.extend(value for value in vars(at).values() if hasattr(value, "to_dict") and hasattr(value, "model_type"))


def require_finite(model: nn.Module, where: str) -> None:
    """Raise ``LoadError`` naming the first parameter, of a model from ``where``, whose numbers are not all finite."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
            continue
        # The sum is finite where all are; a large one may overflow, so then all are looked at. Some at a time, since
        # each is made a float64 to be summed.
        own = parameter.detach()
        sums = (part.sum(dtype=torch.float64).item() for part in torch.split(own.reshape(-1), 1 << 20))
        if not all(map(math.isfinite, sums)):
            bad = int((~torch.isfinite(own)).count_nonzero())
            if bad:
                raise LoadError(f"{where}: {bad:,} of the {parameter.numel():,} numbers of {name} are not finite")


def _model_class(files: ModelFiles, config: Any, trust: bool) -> Any:
    """The class the config names; without a name, the first class for its type whose head the checkpoint has."""
    import transformers

    remote = [name for name in files.config.get("auto_map") or () if str(name).startswith("AutoModel")]
    if trust and remote:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with failures(f"the code that {files.folder / CONFIG} names cannot be used"):
            return get_class_from_dynamic_module(files.config["auto_map"][remote[-1]], files.folder)
    names = files.config.get("architectures") or [None]
    named = getattr(transformers, names[0], None) if isinstance(names, list) and isinstance(names[0], str) else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        if not isinstance(config, named.config_class or object):
            raise LoadError(f"{files.folder / CONFIG} names {names[0]}, which is no {config.model_type} model")
        return named
    autos = _AUTO_CLASSES[2:] if getattr(config, "is_decoder", False) else _AUTO_CLASSES
    mappings = (getattr(transformers, auto)._model_mapping for auto in autos)
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    classes = [cls for entry in known for cls in (entry if isinstance(entry, tuple) else (entry,))]
    found = next((cls for cls in classes if _has_head(files, cls, config)), None)
    if found is None:
        raise LoadError(f"no model class of transformers fits {files.folder / CONFIG}: name one in its architectures")
    return found


def _has_head(files: ModelFiles, cls: Any, config: Any) -> bool:
    """Whether the checkpoint holds every tensor that ``cls`` has outside of its base model."""
    if not files.shards:
        return True
    model = _on_meta(files.folder, cls, config, None)
    base = f"{cls.base_model_prefix}."
    if not hasattr(model, cls.base_model_prefix):
        return not any(name.startswith(base) for name in files.tensors)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    head = {name for name in model.state_dict() if not name.startswith(base)} - tied
    return head <= files.tensors and any(name.startswith(base) for name in files.tensors)


def _on_meta(folder: Path, cls: Any, config: Any, dtype: torch.dtype | None) -> nn.Module:
    # What AutoModel.from_config calls: the public constructor would leave the config's dtype out.
    with failures(f"{cls.__name__} cannot be built from {folder / CONFIG}"), torch.device("meta"):
        model = cls._from_config(config, dtype=dtype or config.dtype)
    assert isinstance(model, nn.Module)
    return model.eval()


def _pretrained(
    folder: Path, shards: Iterable[Path], cls: Any, config: Any, trust: bool, dtype: torch.dtype | None
) -> tuple[nn.Module, tuple[str, ...]]:
    _require_room(folder, shards, _on_meta(folder, cls, config, None))
    with failures(f"{cls.__name__} cannot be loaded from {folder}"):
        model, report = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust,
            # The report names tensor and shapes, where the refusal of transformers points at a log.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise LoadError(f"{folder}: {name} is {list(found)}, but {CONFIG} makes it {list(wanted)}")
    for name in sorted(report["missing_keys"]):
        raise LoadError(f"{folder} lacks the tensor {name} that {cls.__name__} needs")
    unused = tuple(sorted(report["unexpected_keys"]))
    for name in unused:
        if not _of_absent_part(model, name):
            raise LoadError(f"{folder} holds the tensor {name}, for which {cls.__name__} has no place")
    return model, unused


def _require_room(folder: Path, shards: Iterable[Path], hollow: nn.Module) -> None:
    """Raise ``LoadError`` where the config makes much more than the weights hold, before there is memory for it."""
    held = shapes_in(shards)
    for name, tensor in sorted(hollow.state_dict().items()):
        if held.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise LoadError(f"{folder}: {name} is {list(held[name])}, but {CONFIG} makes it {list(tensor.shape)}")
    made, found = sum(p.numel() for p in hollow.parameters()), sum(map(math.prod, held.values()))
    if made > _ROOM * found:
        raise LoadError(f"{folder}: {CONFIG} makes a model of {made:,} numbers, but its weights hold {found:,}")


def _of_absent_part(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a whole part beside the layers that the class leaves out, such as BERT's pooler.

    A tensor of a layer, of a layer beyond the last, or of a module that is there means that the config is wrong.
    """
    path = name.split(".")
    module, depth = model, 0
    while depth < len(path) and isinstance(getattr(module, path[depth], None), nn.Module):
        module, depth = getattr(module, path[depth]), depth + 1
    own = any(True for _ in module.parameters(recurse=False))
    return not own and depth < len(path) - 1 and not any(part.isdigit() for part in path[: depth + 1])


def _from_adapter(spec: str, folder: Path, trust: bool, dtype: torch.dtype | None) -> LoadedModel:
    adapter_tensors(folder)
    base = base_of(folder)
    try:
        loaded = load_model(base, trust_remote_code=trust, dtype=dtype)
    except LoadError as failure:
        raise LoadError(f"the base model of {folder} cannot be loaded: {failure}") from failure
    if loaded.config_only:
        raise LoadError(f"the base model of {folder} is {base}, which has no weights")
    model = load_adapter(loaded.model, folder)
    require_finite(model, str(folder))
    return replace(loaded, model=model, spec=spec, source=folder)


def _download(spec: str, trust: bool, weights: bool = True) -> Path:
    """The snapshot of a hub repository: config, safetensors, tokenizer; code only when it is trusted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", ADAPTER_WEIGHTS, INDEX, "*.txt", "*.model", "*.jinja"]
    wanted += ["model*.safetensors", WEIGHTS] if weights else []
    try:
        return Path(snapshot_download(spec, allow_patterns=wanted + ["*.py"] * trust, ignore_patterns=["*/*"]))
    except (OSError, HFValidationError) as failure:
        raise LoadError(
            f"there is no folder {spec}, and no model of that name could be had from the Hugging Face Hub: "
            f"{sentence(failure)}"
        ) from failure


def _from_factory(spec: str, dtype: torch.dtype | None) -> LoadedModel:
    module_name, _, path = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as failure:
        if isinstance(failure, ModuleNotFoundError) and f"{module_name}.".startswith(f"{failure.name}."):
            raise LoadError(f"there is no module {failure.name}, which {spec} names") from failure
        raise LoadError(f"importing {module_name} failed: {sentence(failure)}") from failure
    for name in path.split("."):
        if not hasattr(found, name):
            raise LoadError(f"{getattr(found, '__name__', module_name)} has no {name}, which {spec} names")
        found = getattr(found, name)
    if not callable(found):
        raise LoadError(f"{spec} is {type(found).__name__}, not a function that returns a model")
    with failures(f"{spec} failed"):
        model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} returns {type(model).__name__}, not a torch.nn.Module")
    if packed := quantised_module(model):
        raise LoadError(f"{spec} is quantised ({packed}), and packed weights cannot be cut: give the unquantised model")
    model = model.eval() if dtype is None else model.to(dtype).eval()
    return LoadedModel(model, spec, config_only=any(p.is_meta for p in model.parameters()))


__all__ = ["LoadedModel", "is_sheared", "load_model", "quiet"]
