"""Saving and loading sheared models: safetensors, the plan beside the weights, stock reload checked on the spot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from shear_backends.adapter_store import ADAPTERS, has_saved_adapters, same_active, with_adapters, write_adapters
from shear_backends.adapters import require_lora
from shear_backends.folder import written_whole
from shear_backends.graph import tensors_of
from shear_backends.module import RECORD, Recipe, Record, build, cut_by_id
from shear_backends.record_file import RECORD_FILE, RecordDocument, read_record, require_sheared, write_record
from shear_backends.verify import difference, evaluation, run
from shear_ir.errors import LoadError, PlanError, SaveError
from shear_ir.frontend.adapter_files import base_of, load_adapter
from shear_ir.frontend.base import has_adapters, plain_base
from shear_ir.frontend.feeds import inputs_of
from shear_ir.frontend.files import ADAPTER_CONFIG
from shear_ir.frontend.inputs import example_inputs
from shear_ir.frontend.load import load_model, quiet
from shear_ir.plans import Plan, original, write_text

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
# What belongs to a model beside weights and config: data files only, never code.
_CARRIED = (
    "*token*.json", "*vocab*", "merges.txt", "*.model", "*.jinja", "*.tiktoken", "chat_template.json",
    "*processor_config.json", "modules.json", "*sentence*.json", "1_Pooling/config.json",
)  # fmt: skip
_OURS = ("config.json", "generation_config.json", RECORD_FILE, PLAN_FILE)


@dataclass(frozen=True)
class Saved:
    """Where a model was written. ``stock``: the stock class's ``from_pretrained`` gives identical outputs;
    ``note``: why not, when it does not, or the cast that has to follow."""

    path: Path
    stock: bool
    note: str = ""


def save(model: nn.Module, out: str | Path, *, source: str | Path | None = None, force: bool = False) -> Saved:
    """Write ``model`` to the folder ``out``, whole or not at all; what belongs to it is carried along from ``source``.

    A PEFT model is written as its base, and beside it each adapter as PEFT writes it. A model that its own config
    builds is reloaded by its stock class, and the adapters by PEFT, and compared, bit for bit. Raises ``SaveError``
    when ``out`` exists (without ``force``) or cannot be written.
    """
    adapted = _is_peft(model)
    whole: Record | None = vars(model).get(RECORD)
    if adapted:
        require_lora(model)
    dense = plain_base(model) if adapted else model
    record: Record | None = vars(dense).get(RECORD)
    if record is None:
        raise SaveError("this model has not been sheared: save it as you would any other")
    if any(t.is_meta for t in tensors_of(model).values()):
        raise SaveError("this model is on the meta device and has no weights to save")
    with written_whole(Path(out), force) as beside:
        if source is not None:
            carry(Path(source), beside)
        stock, note = _write_model(dense, beside, record)
        if adapted:
            write_adapters(model, beside, Path(out))
            if whole is not None:
                whole.plan.save(beside / ADAPTERS / PLAN_FILE)
            if stock:
                stock, note = _stock(dense, beside, record, model)
        write_text(beside / "README.md", _card(dense, record.plan, stock, note) + _adapters_card(model, adapted))
    return Saved(Path(out), stock, note)


def load(path: str | Path, model: nn.Module | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """Read a folder that ``save`` wrote, in evaluation mode; with its adapters, if there are any, as a PEFT model.

    The folder may also be that of one adapter (of ``adapters/``, or from ``project``), which is loaded on its base.

    ``model``: the dense model, needed for classes that are not transformers' own (its weights are not used).
    ``trust_remote_code``: run the code that a stock folder names. Raises ``LoadError`` when the folder is damaged,
    ``PlanError`` when ``model`` is not the one that was sheared.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        base = Path(base_of(folder))
        return load_adapter(_load_base(base, model, trust_remote_code), folder)
    small = _load_base(folder, model, trust_remote_code)
    if not has_saved_adapters(folder):
        return small
    adapted = with_adapters(small, folder)
    if (folder / ADAPTERS / PLAN_FILE).is_file():
        record: Record = vars(small)[RECORD]
        plan = Plan.load(folder / ADAPTERS / PLAN_FILE)
        whole = replace(record, plan=plan, attributes={}, norms=(), gathers=(), fits=())
        object.__setattr__(adapted, RECORD, whole)
    return adapted


def _load_base(folder: Path, model: nn.Module | None, trust_remote_code: bool) -> nn.Module:
    require_sheared(folder)
    document = read_record(folder)
    record = document.record(Plan.load(folder / PLAN_FILE))
    if record.stock:
        small = load_model(str(folder), trust_remote_code=trust_remote_code).model
    else:
        known = plain_base(model) if model is not None and has_adapters(model) else model
        dense = known if known is not None else _dense(document, folder)
        small = _filled(folder, dense, record)
    object.__setattr__(small, RECORD, record)
    small.eval()
    return small


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and has_adapters(model) and hasattr(model, "get_base_model")


def _write_model(model: nn.Module, folder: Path, record: Record) -> tuple[bool, str]:
    """Write a model without adapters; whether its stock class loads it, and why not."""
    pretrained = hasattr(model, "save_pretrained") and not hasattr(model, "peft_config")
    _write(model, folder, pretrained, record.stock)
    record.plan.save(folder / PLAN_FILE)
    stock, note = _stock(model, folder, record) if pretrained else (False, "not a transformers model")
    if record.stock and not stock:
        _write(model, folder, pretrained, stock)
    write_record(folder, model, replace(record, stock=stock), () if stock else _exchanged(model, folder, record))
    return stock, note


def _write(model: nn.Module, folder: Path, pretrained: bool, stock: bool) -> None:
    if pretrained:
        with quiet(), _every_tensor(model) if not stock else nullcontext():
            # transformers saves some families under older names, which only its own loader maps back.
            model.save_pretrained(folder, save_original_format=stock)  # type: ignore[operator]
        return
    first: dict[int, str] = {}
    unique = {n: t for n, t in model.state_dict().items() if first.setdefault(t.data_ptr() or id(t), n) == n}
    save_file({n: t.detach().contiguous() for n, t in unique.items()}, folder / WEIGHTS_FILE)


@contextmanager
def _every_tensor(model: nn.Module) -> Iterator[None]:
    """Inside, ``save_pretrained`` also writes the tables that stock code would compute, such as Marian's positions."""
    left_out = getattr(model, "_keys_to_ignore_on_save", None)
    object.__setattr__(model, "_keys_to_ignore_on_save", None)
    try:
        yield
    finally:
        object.__setattr__(model, "_keys_to_ignore_on_save", left_out)


def _exchanged(model: nn.Module, folder: Path, record: Record) -> list[str]:
    """The modules that are of another class than those that the config builds in their place.

    Some models exchange modules of their own at the first inputs, as BigBird does its attention where they are short.
    """
    try:
        built = dict(_built(type(model).__name__, record.config, folder).named_modules())
    except LoadError:
        return []
    then = ((path, built.get(original(path, record.plan.gone)), module) for path, module in model.named_modules())
    return [path for path, old, module in then if old is not None and _class(old) is not _class(module)]


def _class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; a parametrisation, such as a weight norm, gives each its own below it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def carry(source: Path, folder: Path) -> None:
    """Copy what belongs to a model beside weights and config, such as its tokenizer, and never code."""
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            name = file.relative_to(source)
            if str(name) in _OURS or name.name.endswith(".index.json") or file.is_symlink() or not file.is_file():
                continue
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)


def _stock(model: nn.Module, folder: Path, record: Record, adapted: nn.Module | None = None) -> tuple[bool, str]:
    """Whether stock code alone gives the same outputs: transformers for ``model``, PEFT for its ``adapted`` form."""
    if not record.stock:
        return False, "no config of the class has these sizes"
    try:
        with quiet():
            again = type(model).from_pretrained(folder, **_loading(model)).eval()  # type: ignore[attr-defined]
            if adapted is not None:
                model, again = adapted, same_active(adapted, folder, again)
    except Exception as failure:  # whatever stock code raises, the answer is that stock code does not load it
        return False, f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    again = again.to(next(model.parameters()).device)
    cast = _cast_alike(model, again)
    feed = inputs_of(model)
    with evaluation(model), evaluation(again), torch.no_grad():
        gap = difference(run(model, feed), run(again, feed))
    return gap == 0.0, cast if gap == 0.0 else f"the reloaded model's outputs differ by {gap:.3g}"


def _cast_alike(model: nn.Module, again: nn.Module) -> str:
    """Cast what ``again`` computes when it is made, such as rotary frequencies, as a ``.to(dtype)`` did in ``model``.

    No file holds such buffers: whoever loads the model makes them anew, in full precision. Says so where it applies.
    """
    said = ""
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            mine, made = module._buffers[name], again.get_submodule(path)._buffers.get(name)
            if mine is not None and made is not None and mine.dtype != made.dtype and mine.is_floating_point():
                again.get_submodule(path)._buffers[name] = made.to(mine.dtype)
                said = said or (
                    f"computed buffers such as {name} were cast: from_pretrained(path).to({mine.dtype}) gives the same "
                    f"outputs, from_pretrained(path) alone keeps them in {str(made.dtype).removeprefix('torch.')}"
                )
    return said


def _loading(model: nn.Module) -> dict[str, Any]:
    """What a reader may choose without changing the function: the dtype, the attention and the experts' product."""
    config: Any = model.config
    chosen = {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
    return {"dtype": next(model.parameters()).dtype, **{name: value for name, value in chosen.items() if value}}


def _check(folder: Path, dense: nn.Module, record: Record) -> None:
    """Refuse a record that would set anything but the sizes that modules and their configs already have."""
    for path, values in record.attributes.items():
        module = _submodule(folder, dense, path, record.plan.gone)
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            holder = getattr(module, owner, None) if owner else module
            known = vars(holder).get(leaf) if owner in ("", "config") and holder is not None else None
            sizes = value if isinstance(value, list) else [value]
            if leaf.startswith("_") or not isinstance(known, int | tuple | list) or isinstance(known, bool):
                raise LoadError(f"{folder / RECORD_FILE} sets {path}.{name}, which is no size of that module")
            if any(not 0 < size <= 2**24 for size in sizes):
                raise LoadError(f"{folder / RECORD_FILE} sets {path}.{name} to {value}, which is no size")
    for gather in record.gathers:
        _submodule(folder, dense, gather.module, record.plan.gone)
        if gather.period < 1 or not gather.kept or not all(0 <= i < gather.period for i in gather.kept):
            raise LoadError(f"{folder / RECORD_FILE} gathers entries of {gather.module} that cannot be there")
    for fit in record.fits:
        _submodule(folder, dense, fit.module, record.plan.gone)
        places = set(fit.places)
        if not len(places) == len(fit.places) == len(fit.old) == len(fit.new) or not places <= set(range(fit.rank)):
            raise LoadError(f"{folder / RECORD_FILE} sets sizes in {fit.module} that cannot be there")
        wider = any(not 0 < new <= old <= 2**24 for old, new in zip(fit.old, fit.new, strict=True))
        if wider or fit.old == fit.new:
            raise LoadError(f"{folder / RECORD_FILE} sets sizes in {fit.module} that no cut leaves")
    for norm in record.norms:
        _submodule(folder, dense, norm.module, record.plan.gone)
        if not 1.0 <= norm.factor <= 2**24:
            raise LoadError(f"{folder / RECORD_FILE} scales {norm.module} by {norm.factor}, which no cut does")


def _submodule(folder: Path, dense: nn.Module, path: str, gone: Sequence[str]) -> nn.Module:
    try:
        return dense.get_submodule(original(path, gone))
    except AttributeError as failure:
        raise PlanError(f"{folder} holds another model than {type(dense).__name__}: it has no {path}") from failure


def _filled(folder: Path, dense: nn.Module, record: Record) -> nn.Module:
    _check(folder, dense, record)
    try:
        recipe = Recipe(None, record.attributes, record.norms, record.gathers, record.fits)
        small = build(dense, cut_by_id(dense, record.plan), recipe, record.plan.gone)
    except (IndexError, AttributeError, RuntimeError) as failure:
        raise PlanError(f"{folder} holds another model than {type(dense).__name__}: {failure}") from failure
    tensors = _tensors(folder)
    try:
        found = small.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as failure:
        raise LoadError(f"{folder} does not fit its record: {str(failure).splitlines()[-1].strip()}") from failure
    if hasattr(small, "tie_weights"):
        small.tie_weights()  # type: ignore[operator]
    shared = _shared_names(dense)
    missing = [n for n in found.missing_keys if not shared.get(n, set()) & tensors.keys()]
    if missing or found.unexpected_keys:
        raise LoadError(f"{folder} does not fit its record: {(missing or found.unexpected_keys)[0]} is out of place")
    if any(t.is_meta for t in tensors_of(small).values()):
        raise LoadError(f"{folder} lacks tensors of {type(dense).__name__}")
    return small


def _shared_names(model: nn.Module) -> dict[str, set[str]]:
    names: dict[int, set[str]] = {}
    for name, tensor in tensors_of(model).items():
        names.setdefault(id(tensor), set()).add(name)
    return {name: names[id(tensor)] for name, tensor in tensors_of(model).items()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            # Clones: what a file maps has any alignment, and some kernels round by alignment.
            found.update({name: tensor.clone() for name, tensor in load_file(file).items()})
    except (SafetensorError, OSError) as failure:
        raise LoadError(f"{file} cannot be read: {failure}") from failure
    if not found:
        raise LoadError(f"{folder} holds no safetensors")
    return found


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


def _card(model: nn.Module, plan: Plan, stock: bool, note: str) -> str:
    loads = (
        f"`{type(model).__name__}.from_pretrained(path)` loads it." if stock
        else f"Stock transformers does not load it ({note}); `shear_ir.load(path)` does."
    )  # fmt: skip
    names = {"parameters": "parameters", "bytes": "bytes", "flops": "FLOPs per token", "kv_bytes": "KV bytes per token"}
    rows = "\n".join(
        f"| {name} | {getattr(plan.before, key):,} | {getattr(plan.after, key):,} |" for key, name in names.items()
    )
    return (
        "---\nlibrary_name: transformers\ntags: [shear-ir, structured-pruning]\n---\n\n"
        f"# {type(model).__name__}, sheared\n\n"
        f"{100 * plan.ratio:.1f} % of the parameters are gone ({len(plan.cuts)} groups cut; `plan.json` says which). "
        f"{loads}\n\n| | dense | sheared |\n|---|---|---|\n{rows}\n"
    )


def _adapters_card(model: nn.Module, adapted: bool) -> str:
    if not adapted:
        return ""
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    return (
        f"\nThe adapters {', '.join(configs)} lie under `{ADAPTERS}/`, as PEFT writes them. `shear_ir.load(path)` "
        "loads them and checks that they belong to this base; `PeftModel.from_pretrained(base, folder)` loads one.\n"
    )
