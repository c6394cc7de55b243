"""An adapter that was trained on a dense base, for the sheared one: cut by the plan's index maps."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.adapters import follow, require_lora, require_lora_config
from shear_backends.module.shear import rescaled
from shear_backends.store.adapter import write_adapter
from shear_backends.store.folder import refuse_existing, written_whole
from shear_backends.store.model import carry
from shear_ir.errors import LoadError, ShearingError
from shear_ir.frontend.adapter_files import AdapterNote, adapter_tensors, moving_start, read_note
from shear_ir.frontend.base import base_digest, base_view, shapes_digest
from shear_ir.frontend.files import ADAPTER_WEIGHTS
from shear_ir.frontend.sentences import failures, quiet
from shear_ir.plans import Plan
from shear_ir.reading import Unreadable, require_regular
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.cuts import checked
from shear_passes.rewrite.shear import cut_tensor


@dataclass(frozen=True)
class Projected:
    """Where an adapter was written. ``tensors``: how many it has, ``cut`` of them are smaller; parameters before and
    after; ``base_digest``: that of the sheared base it belongs to."""

    path: Path
    tensors: int
    cut: int
    before: int
    after: int
    base_digest: str


def project_adapter(
    adapter: Path, dense: nn.Module, groups: Groups, plan: Plan, out: Path, *, sheared: Path | None = None,
    force: bool = False,
) -> Projected:  # fmt: skip
    """Write the adapter in the folder ``adapter`` for the sheared base to the folder ``out``, whole or not at all.

    ``dense``: the base it was trained on, for which ``plan`` was made; its weights are not used, the meta device will
    do. ``groups``: those of ``dense``. ``sheared``: the folder of the sheared base, which the result will name. Raises
    ``LoadError`` when the adapter does not fit ``dense``, ``PlanError`` when the plan does not, ``ShearingError`` for
    adapters other than LoRA and DoRA, and for starts that changed the base.
    """
    refuse_existing(out, force)
    cut = checked(groups, plan)
    names = adapter_tensors(adapter)
    note = read_note(adapter)
    if note is not None and note.base_digest != base_digest(dense):
        raise LoadError(f"the adapter {adapter} was made for a base of other shapes than this {type(dense).__name__}")
    config, model = _adapted(adapter, dense)
    given = _tensors(adapter, names, model)
    kept = follow(model, plan.kept)
    copies = base_view(model).tensors
    fixes = {name: fix for fix in cut.norms for name in copies[fix.parameter]}
    tensors: dict[str, Tensor] = {}
    for key, (name, tensor) in given.items():
        tensor = cut_tensor(tensor, kept.get(name, {}))
        tensors[key] = rescaled(tensor, fixes[name]) if name in fixes else tensor
    digest = shapes_digest(_cut_shapes(dense, plan))
    beside_base = os.path.relpath(sheared, out) if sheared is not None else ""
    with written_whole(out, force) as folder:
        carry(adapter, folder)
        write_adapter(folder, tensors, config, AdapterNote(base_digest=digest, base=beside_base))
    return Projected(
        out,
        len(given),
        sum(tensors[key].shape != tensor.shape for key, (_, tensor) in given.items()),
        sum(tensor.numel() for _, tensor in given.values()),
        sum(tensor.numel() for tensor in tensors.values()),
        digest,
    )


def _adapted(adapter: Path, dense: nn.Module) -> tuple[Any, nn.Module]:
    """The adapter's config, and a PEFT model of it without weights."""
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as failure:
        raise LoadError(f"{adapter} is an adapter, which peft loads: pip install 'shear-ir[peft]'") from failure
    if start := moving_start(adapter):
        raise ShearingError(
            f"the adapter {adapter} started as {start}, which changed the weights of its base, and the sheared base "
            "was cut from the unchanged ones: save it as plain LoRA first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or shear the PEFT model itself"
        )
    with quiet(), failures(f"the adapter {adapter} does not fit its base model"):
        config = PeftConfig.from_pretrained(str(adapter))
    require_lora_config(str(adapter), config)
    made = copy.deepcopy(config)
    made.init_lora_weights = False
    memo: dict[int, Any] = {}
    for tensor in named_tensors(dense).values():
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    with quiet(), failures(f"the adapter {adapter} does not fit its base model"), torch.device("meta"):
        model = get_peft_model(copy.deepcopy(dense, memo), made)
    assert isinstance(model, nn.Module)
    require_lora(model)
    return config, model


def _tensors(adapter: Path, names: frozenset[str], model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """The adapter's tensors under the names of its file, each with its name in the PEFT model."""
    from peft import get_peft_model_state_dict

    state = model.state_dict()
    places = {id(tensor): name for name, tensor in state.items()}
    with quiet():
        wanted = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    # Beside its own tensors a file may hold whole embeddings, under the names of the PEFT model.
    place = {**{name: name for name in state}, **{key: places[id(tensor)] for key, tensor in wanted.items()}}
    path = adapter / ADAPTER_WEIGHTS
    for key in sorted(set(wanted) - names):
        raise LoadError(f"{path} lacks the tensor {key}")
    for key in sorted(names - set(place)):
        raise LoadError(f"{path} holds the tensor {key}, for which the model has no place")
    try:
        require_regular(path)
        tensors = load_file(path)
    except (SafetensorError, OSError, Unreadable) as failure:
        raise LoadError(f"{path} cannot be read: {failure}") from failure
    for key, tensor in sorted(tensors.items()):
        if tensor.shape != state[place[key]].shape:
            raise LoadError(f"{path}: {key} is {list(tensor.shape)}, but on this base {list(state[place[key]].shape)}")
    return {key: (place[key], tensor) for key, tensor in tensors.items()}


def _cut_shapes(dense: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The shapes of the saved tensors of the sheared base."""
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    twins: dict[int, set[str]] = {}
    for name, tensor in named_tensors(dense).items():
        twins.setdefault(id(tensor), set()).add(name)
    for names in twins.values():
        cut = next((plan.kept[name] for name in names if name in plan.kept), {})
        for name in names & shapes.keys():
            shapes[name] = tuple(len(cut[d]) if d in cut else size for d, size in enumerate(shapes[name]))
    return shapes
