"""Saving and loading sheared models: safetensors, the plan beside the weights; what was written is read before it is
published, and compared with the model, which says whether stock code loads it too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from shear_backends.graph.module import ShearedGraph, named_tensors
from shear_backends.module.adapters import require_lora
from shear_backends.module.shear import RECORD, Record, skeleton_of
from shear_backends.store.adapter import ADAPTERS, has_saved_adapters, with_adapters, write_adapters
from shear_backends.store.folder import written_whole
from shear_backends.store.graph import load_graph, write_graph
from shear_backends.store.readback import Verdict, adapted_verdict, require_readable, stock_verdict
from shear_backends.store.rebuild import rebuilt
from shear_backends.store.record_file import (
    PLAN_FILE,
    RECORD_FILE,
    plain_document,
    read_record,
    require_sheared,
    write_record,
)
from shear_backends.store.reread import apart, cast, identity
from shear_ir.errors import LoadError, PlanError, SaveError
from shear_ir.frontend.adapter_files import base_of, load_adapter
from shear_ir.frontend.base import has_adapters, plain_base
from shear_ir.frontend.files import ADAPTER_CONFIG
from shear_ir.frontend.load import load_model, quiet, require_finite
from shear_ir.frontend.sentences import sentence
from shear_ir.plans import Plan
from shear_ir.reading import contains
from shear_ir.writing import write_text

WEIGHTS_FILE = "model.safetensors"
# What belongs to a model beside weights and config: data files only, never code.
_CARRIED = (
    "*token*.json", "*vocab*", "merges.txt", "*.model", "*.jinja", "*.tiktoken", "chat_template.json",
    "*processor_config.json", "modules.json", "*sentence*.json", "1_Pooling/config.json",
)  # fmt: skip
_NEVER = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".safetensors")
_OURS = ("config.json", "generation_config.json", RECORD_FILE, PLAN_FILE)


_HEAD = "---\nlibrary_name: transformers\ntags: [shear-ir, structured-pruning]\n---\n\n"


@dataclass(frozen=True)
class Saved:
    """Where a model was written. ``stock``: the stock class's ``from_pretrained`` gives the same function;
    ``note``: why not, when it does not, or the cast that has to follow."""

    path: Path
    stock: bool
    note: str = ""


def save(model: nn.Module, out: str | Path, *, source: str | Path | None = None, force: bool = False) -> Saved:
    """Write ``model`` to the folder ``out``, whole or not at all; what belongs to it is carried along from ``source``.

    A PEFT model is written as its base, and beside it each adapter as PEFT writes it. What was written is read again,
    by its stock class where its own config builds the model, and compared bit for bit before it appears. A model of
    transformers that brings no record of a cut, as from ``from_pretrained``, is written as its class does.
    Raises ``SaveError`` when ``out`` exists (without ``force``), cannot be written, or would not load as it is.
    """
    model = _unwrapped(model)
    if isinstance(model, ShearedGraph):
        return _save_graph(model, Path(out), source, force)
    adapted = _is_peft(model)
    whole: Record | None = vars(model).get(RECORD)
    if adapted:
        require_lora(model)
    dense = plain_base(model) if adapted else model
    record: Record | None = vars(dense).get(RECORD)
    if record is None and not _is_pretrained(dense):
        raise SaveError("this model has not been sheared: save it as you would any other")
    if any(t.is_meta for t in named_tensors(model).values()):
        raise SaveError("this model is on the meta device and has no weights to save")
    with written_whole(Path(out), force) as beside:
        _carry_from(source, beside)
        verdict = _write_model(dense, beside, record)
        if adapted:
            write_adapters(model, beside)
            if whole is not None:
                whole.plan.save(beside / ADAPTERS / PLAN_FILE)
            verdict = adapted_verdict(model, dense, beside, verdict)
        write_text(beside / "README.md", _card(dense, record, verdict) + _adapters_card(model, adapted))
    return Saved(Path(out), verdict.stock, verdict.note)


def _save_graph(graph: ShearedGraph, out: Path, source: str | Path | None, force: bool) -> Saved:
    note = "a graph, and no module of its class"
    with written_whole(out, force) as beside:
        _carry_from(source, beside)
        write_graph(graph, beside)
        assert graph.record is not None  # write_graph sees to it
        card = _card_of(graph.record.model_class, graph.record.plan, Verdict(False, note))
        write_text(beside / "README.md", card)
    return Saved(out, False, note)


def _carry_from(source: str | Path | None, folder: Path) -> None:
    if source is None:
        return
    if not Path(source).is_dir():
        raise SaveError(f"there is no folder {source} to carry files along from")
    carry(Path(source), folder)


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
    if not document.sheared:
        return load_model(str(folder), trust_remote_code=trust_remote_code).model
    if document.backend == "graph":
        return load_graph(folder, document, model)
    record = document.record(Plan.load(folder / PLAN_FILE))
    if model is not None and type(plain_base(model) if has_adapters(model) else model).__name__ != document.model_class:
        raise PlanError(f"{folder} was made of a {document.model_class}, not of a {type(model).__name__}")
    if record.stock:
        small = load_model(str(folder), trust_remote_code=trust_remote_code).model
        try:
            cast(small, document.casts)
        except AttributeError as failure:
            raise LoadError(f"{folder / RECORD_FILE} casts what is not there: {failure}") from failure
    else:
        known = plain_base(model) if model is not None and has_adapters(model) else model
        if known is not None and record.skeleton is None:
            record = replace(record, skeleton=skeleton_of(known))
        small = rebuilt(folder, document, record, known)
        require_finite(small, str(folder))
    object.__setattr__(small, RECORD, record)
    small.eval()
    return small


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and has_adapters(model) and hasattr(model, "get_base_model")


def _is_pretrained(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and not hasattr(model, "peft_config")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` or data parallelism has put a module of its own around."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, parallel) else vars(model).get("_modules", {}).get("_orig_mod")
        if inner is None:
            return model
        model = inner


def _write_model(model: nn.Module, folder: Path, record: Record | None) -> Verdict:
    """Write a model without adapters, and read it again; whether its stock class loads it, and why not."""
    pretrained = _is_pretrained(model)
    stock = record is None or record.stock
    _write(model, folder, pretrained, stock)
    if not pretrained:
        verdict = Verdict(False, "not a transformers model")
    elif not stock:
        exchanged = record is not None and record.rms_norms is not None
        why = "its layer norms have become RMS norms" if exchanged else "no config of the class has these sizes"
        verdict = Verdict(False, why)
    else:
        verdict = stock_verdict(model, folder)
    if record is None:
        if not verdict.stock:
            raise SaveError(
                f"{type(model).__name__} brings no record of a cut, and its class does not load it as it is: "
                f"{verdict.note}"
            )
        write_record(folder, plain_document(model))
        return verdict
    record.plan.save(folder / PLAN_FILE)
    if stock and not verdict.stock:
        _write(model, folder, pretrained, False)
    require_readable(model, folder, replace(record, stock=verdict.stock), verdict)
    return verdict


def _write(model: nn.Module, folder: Path, pretrained: bool, stock: bool) -> None:
    if pretrained:
        try:
            with quiet(), _every_tensor(model) if not stock else nullcontext():
                # transformers saves some families under older names, which only its own loader maps back.
                model.save_pretrained(folder, save_original_format=stock)  # type: ignore[operator]
        except (OSError, SafetensorError):
            raise
        except Exception as failure:  # such as a generation config that its class refuses
            raise SaveError(f"{type(model).__name__} refuses to be saved: {sentence(failure)}") from failure
        return
    tensors: dict[str, Tensor] = {}
    known: set[Any] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise SaveError(f"{type(model).__name__} keeps {name} in its state dict, which is no tensor")
        if (own := identity(tensor)) in known:
            continue
        known.add(own)
        tensors[name] = tensor
    save_file(apart(tensors), folder / WEIGHTS_FILE)


@contextmanager
def _every_tensor(model: nn.Module) -> Iterator[None]:
    """Inside, ``save_pretrained`` also writes the tables that stock code would compute, such as Marian's positions."""
    left_out = getattr(model, "_keys_to_ignore_on_save", None)
    object.__setattr__(model, "_keys_to_ignore_on_save", None)
    try:
        yield
    finally:
        object.__setattr__(model, "_keys_to_ignore_on_save", left_out)


def carry(source: Path, folder: Path) -> None:
    """Copy what belongs to a model beside weights and config, such as its tokenizer, and never code."""
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            name = file.relative_to(source)
            if str(name) in _OURS or name.name.endswith(".index.json") or name.suffix in _NEVER:
                continue
            # A link may lead to anything of the user's: nothing from outside of the folder goes into the result.
            if not contains(source, file) or not file.is_file():
                continue
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)


def _card(model: nn.Module, record: Record | None, verdict: Verdict) -> str:
    if record is not None:
        return _card_of(type(model).__name__, record.plan, verdict)
    name = type(model).__name__
    return (
        f"{_HEAD}# {name}\n\nIt brought no record of what was cut from it, and lies here as it was. "
        f"`{name}.from_pretrained(path)` loads it.\n"
    )


def _card_of(name: str, plan: Plan, verdict: Verdict) -> str:
    loads = f"`{name}.from_pretrained(path)` loads it."
    if not verdict.stock:
        loads = f"Stock transformers does not load it ({verdict.note}); `shear_ir.load(path)` does."
    names = {"parameters": "parameters", "bytes": "bytes", "flops": "FLOPs per token", "kv_bytes": "KV bytes per token"}
    rows = "\n".join(
        f"| {said} | {getattr(plan.before, key):,} | {getattr(plan.after, key):,} |" for key, said in names.items()
    )
    return (
        f"{_HEAD}# {name}, sheared\n\n"
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
