"""A sheared model from the folder it was written to: its dense class, the record of what was cut, and the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.rms_norms import exchange, rms_norms_of
from shear_backends.module.shear import ModuleChanges, Record, build, cut_by_id
from shear_backends.store.record_file import RECORD_FILE, RecordDocument
from shear_backends.store.reread import cast, class_of, plain, read_tensors
from shear_backends.verify.numbers import evaluation, run
from shear_ir.errors import LoadError, PlanError
from shear_ir.frontend.files import CONFIG, read_header, read_json, refuse_kernels
from shear_ir.frontend.inputs import example_inputs
from shear_ir.frontend.sentences import failures
from shear_ir.frontend.unchanged import copied
from shear_ir.paths import split
from shear_ir.plans import original

_LARGEST = 2**24
_MOST_DIMS = 64
_GENERATION = "generation_config.json"
_PRECISIONS = ("float16", "bfloat16", "float32", "float64")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip


def rebuilt(
    folder: Path, document: RecordDocument, record: Record, dense: nn.Module | None, *, weights: bool = True
) -> nn.Module:
    """The model in ``folder``, which ``document`` describes.

    ``dense``: the dense model, where the document names no class of transformers; its weights are not used.
    ``weights``: False leaves the tensors of the files on the meta device. Raises ``LoadError`` for a damaged folder and
    ``PlanError`` for another ``dense``.
    """
    small = hollow(folder, document, record, dense)
    _fill(folder, small, stored_tensors(folder) if weights else _headers(folder))
    cast(small, document.casts)
    _adopt_today(folder, small)
    return small


def hollow(folder: Path, document: RecordDocument, record: Record, dense: nn.Module | None) -> nn.Module:
    """The same with the tensors that the dense class is made with, cut, instead of those of the files."""
    dense = dense if dense is not None else _dense(document, folder)
    dense = _with_rms_norms(folder, dense, record)
    _check(folder, dense, record)
    try:
        recipe = ModuleChanges(None, record.attributes, record.norms, record.gathers, record.fits)
        small = build(dense, cut_by_id(dense, record.plan), recipe, record.plan.gone)
    except (IndexError, AttributeError, RuntimeError) as failure:
        raise PlanError(f"{folder} holds another model than {type(dense).__name__}: {failure}") from failure
    _resize(folder, small, document.shapes)
    _check_casts(folder, small, document.casts)
    return small


def shards(folder: Path) -> dict[Path, frozenset[str]]:
    """The names of the tensors in each file of a folder."""
    found: dict[Path, frozenset[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found[path] = read_header(path)
    if not found:
        raise LoadError(f"{folder} holds no safetensors")
    return found


def exchanged_modules(model: nn.Module, folder: Path, record: Record) -> list[str]:
    """The modules that are of another class than those that the config builds in their place.

    Some models exchange modules of their own at the first inputs, as BigBird does its attention where they are short.
    """
    try:
        dense = _built(type(model).__name__, record.config, folder)
    except LoadError:
        return []
    built = dict(_with_rms_norms(folder, dense, record).named_modules())
    then = ((path, built.get(original(path, record.plan.gone)), module) for path, module in model.named_modules())
    return [path for path, old, module in then if old is not None and class_of(old) is not class_of(module)]


def _check(folder: Path, dense: nn.Module, record: Record) -> None:
    """Refuse a record that would set anything but the sizes that modules and their configs already have."""
    for path, values in record.attributes.items():
        module = _submodule(folder, dense, path, record.plan.gone)
        for name, value in values.items():
            owner, leaf = split(name)
            holder = getattr(module, owner, None) if owner else module
            known = vars(holder).get(leaf) if owner in ("", "config") and holder is not None else None
            sizes = value if isinstance(value, list | tuple) else [value]
            if leaf.startswith("_") or not isinstance(known, int | tuple | list) or isinstance(known, bool):
                raise LoadError(f"{folder / RECORD_FILE} sets {path}.{name}, which is no size of that module")
            if any(not 0 < size <= _LARGEST for size in sizes):
                raise LoadError(f"{folder / RECORD_FILE} sets {path}.{name} to {value}, which is no size")
    for gather in record.gathers:
        _submodule(folder, dense, gather.module, record.plan.gone)
        if gather.period < 1 or not gather.kept or not all(0 <= i < gather.period for i in gather.kept):
            raise LoadError(f"{folder / RECORD_FILE} gathers entries of {gather.module} that cannot be there")
    for fit in record.fits:
        _submodule(folder, dense, fit.module, record.plan.gone)
        places = set(fit.places)
        if not 0 < fit.rank <= _MOST_DIMS:
            raise LoadError(f"{folder / RECORD_FILE} sets sizes in {fit.module} of {fit.rank} dims")
        if not len(places) == len(fit.places) == len(fit.old) == len(fit.new) or not places <= set(range(fit.rank)):
            raise LoadError(f"{folder / RECORD_FILE} sets sizes in {fit.module} that cannot be there")
        wider = any(not 0 < new <= old <= _LARGEST for old, new in zip(fit.old, fit.new, strict=True))
        if wider or fit.old == fit.new:
            raise LoadError(f"{folder / RECORD_FILE} sets sizes in {fit.module} that no cut leaves")
    for norm in record.norms:
        _submodule(folder, dense, norm.module, record.plan.gone)
        if not 1.0 <= norm.factor <= _LARGEST or not 0.0 < norm.power <= 1.0 or abs(norm.offset) > 1.0:
            raise LoadError(f"{folder / RECORD_FILE} scales {norm.module} by {norm.factor}, which no cut does")
        if norm.eps is not None and not 0.0 <= norm.eps < 1.0:
            raise LoadError(f"{folder / RECORD_FILE} gives {norm.module} an eps that none has")


def _with_rms_norms(folder: Path, dense: nn.Module, record: Record) -> nn.Module:
    """``dense`` with the RMS norms that stood in it before it was cut; a copy where it does not have them."""
    made = record.rms_norms
    if made is None or rms_norms_of(dense) == made:
        return dense
    if any(not 0 <= eps < 1 for eps in made.norms.values()):
        raise LoadError(f"{folder / RECORD_FILE} gives a norm an eps that none has")
    small = copied(dense)
    try:
        exchange(small, made)
    except PlanError as failure:
        raise PlanError(f"{folder} holds another model than {type(dense).__name__}: {failure}") from failure
    return small


def _check_casts(folder: Path, small: nn.Module, kinds: Mapping[str, str]) -> None:
    computed = {
        f"{path}.{leaf}" if path else leaf
        for path, module in small.named_modules()
        for leaf in module._non_persistent_buffers_set
    }
    for name, kind in kinds.items():
        if kind not in _PRECISIONS or name not in computed:
            raise LoadError(f"{folder / RECORD_FILE} casts {name} to {kind}, which is no computed buffer's precision")


def _submodule(folder: Path, dense: nn.Module, path: str, gone: Sequence[str]) -> nn.Module:
    try:
        return dense.get_submodule(original(path, gone))
    except AttributeError as failure:
        raise PlanError(f"{folder} holds another model than {type(dense).__name__}: it has no {path}") from failure


def _resize(folder: Path, small: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Make room for tensors that were given another size after the cut, such as an embedding with more tokens."""
    own = named_tensors(small)
    for name, shape in shapes.items():
        if name not in own or len(shape) != own[name].dim() or any(not 0 < size <= _LARGEST for size in shape):
            raise LoadError(f"{folder / RECORD_FILE} gives {name} the shape {list(shape)}, which it cannot have")
    for names in _shared(small):
        resized = [shapes[name] for name in names if name in shapes]
        if not resized:
            continue
        if len(resized) < len(names) or any(shape != resized[0] for shape in resized):
            raise LoadError(f"{folder / RECORD_FILE} gives {names[0]} two shapes at once")
        old = own[names[0]]
        new = torch.empty(tuple(resized[0]), dtype=old.dtype, device="meta")
        put_tensor(small, names, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _fill(folder: Path, small: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    shared = _shared(small)
    try:
        found = small.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as failure:
        raise LoadError(f"{folder} does not fit its record: {str(failure).splitlines()[-1].strip()}") from failure
    for names in shared:
        loaded = [name for name in names if name in tensors]
        if loaded and len(names) > 1:
            put_tensor(small, names, named_tensors(small)[loaded[0]])
    twins = {name: set(names) for names in shared for name in names}
    missing = [n for n in found.missing_keys if not twins.get(n, set()) & tensors.keys()]
    if missing or found.unexpected_keys:
        raise LoadError(f"{folder} does not fit its record: {(missing or found.unexpected_keys)[0]} is out of place")
    if any(t.is_meta and not twins[n] & tensors.keys() for n, t in named_tensors(small).items()):
        raise LoadError(f"{folder} lacks tensors of {type(small).__name__}")


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of each tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def put_tensor(model: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Let ``model`` have ``tensor`` under all of ``names``."""
    for name in names:
        path, leaf = split(name)
        module = model.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name; raises ``LoadError``."""
    try:
        # Clones: what a file maps has any alignment, and some kernels round by alignment.
        return {name: tensor.clone() for name, tensor in read_tensors(shards(folder))}
    except (SafetensorError, OSError) as failure:
        raise LoadError(f"{folder} cannot be read: {failure}") from failure


def _headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder without their numbers."""
    found: dict[str, Tensor] = {}
    for path, names in shards(folder).items():
        with safe_open(path, "pt") as file:
            for name in names:
                piece = file.get_slice(name)
                kind = _DTYPES.get(piece.get_dtype()) or file.get_tensor(name).dtype
                found[name] = torch.empty(piece.get_shape(), dtype=kind, device="meta")
    return found


def _adopt_today(folder: Path, small: nn.Module) -> None:
    """Give the config the values it had when the model was saved, which may have changed since the cut."""
    config: Any = getattr(small, "config", None)
    if not hasattr(config, "to_dict"):
        return
    with failures(f"{folder / CONFIG} cannot be used"):
        if (folder / CONFIG).is_file():
            read_json(folder / CONFIG)  # says what is wrong with it
            written, _ = type(config).get_config_dict(folder)  # infinite numbers are written in a way of its own
            _adopt(config, type(config).from_dict(written))
        if hasattr(small, "generation_config") and (folder / _GENERATION).is_file():
            from transformers import GenerationConfig

            vars(small)["generation_config"] = GenerationConfig.from_pretrained(folder)


def _adopt(config: Any, today: Any) -> None:
    mine, theirs = plain(config), plain(today)
    for name in theirs:
        held, given = vars(config).get(name), vars(today).get(name)
        if mine.get(name) == theirs[name]:
            continue
        if hasattr(held, "to_dict") and type(held) is type(given):
            _adopt(held, given)
        elif name in vars(today):
            vars(config)[name] = given


def _dense(document: RecordDocument, folder: Path) -> nn.Module:
    """The dense class, its parameters on the meta device and its computed buffers real.

    One that exchanges modules at its first inputs is built whole, so that it can be given some.
    """
    dense = _built(document.model_class, document.config, folder, whole=bool(document.exchanged))
    if document.exchanged:
        try:
            with evaluation(dense), torch.no_grad():
                run(dense, example_inputs(dense))
        except Exception as failure:  # the model's own code
            raise LoadError(f"{folder}: {type(dense).__name__} does not run on example inputs: {failure}") from failure
    return dense


def _built(name: str, given: Mapping[str, Any] | None, folder: Path, *, whole: bool = False) -> nn.Module:
    import transformers

    kind = getattr(transformers, name, None)
    if given is None or not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise LoadError(f"{folder} holds a {name}: give the dense model, load(path, model=...)")
    refuse_kernels(given, folder / RECORD_FILE)
    try:
        config = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(dict(given))
        with nullcontext() if whole else _parameters_on_meta():
            return kind(config)
    except Exception as failure:  # the config comes from a file that anybody may have written
        raise LoadError(f"{folder / RECORD_FILE} holds a config that {name} refuses") from failure


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is there already is a tied one and must stay the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
