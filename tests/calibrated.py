"""Families of the zoo with data to be judged by, and what their units and inputs are, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.manager import AnalysisManager
from shear_ir.program import Program
from shear_passes.analysis.find_groups import Groups
from shear_passes.importance.base import Importance, Scores
from shear_passes.importance.calibration import Calibration, Data
from tests import roads

HEAD = 6  # head_dim of llama_gqa, whose 2 kv heads have 4 query heads each


def traced(family: str) -> tuple[nn.Module, Program, Groups]:
    """A family as the other tests have it; nothing may change it."""
    found = roads.traced(family)
    return found.model, found.program, found.groups


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 60, (3, 9), generator=draw)} for _ in range(count)]


def manager(family: str, data: Any = None, **options: Any) -> AnalysisManager:
    model, program, _ = traced(family)
    fork = sir.analyses(program).fork(dict(model.named_parameters()), without=(Importance,))
    fork.put(Data(), Calibration(model, batches() if data is None else data, **options))
    return fork


def scores(criterion: Importance, family: str = "llama_gqa", data: Any = None, **options: Any) -> Scores:
    return manager(family, data, **options).get(criterion)


def of(found: Scores, name: str, family: str = "llama_gqa") -> npt.NDArray[np.float64]:
    return found[traced(family)[2].by_name[name]]


def inputs_of(family: str, path: str) -> Tensor:
    """Everything a module read, ``(rows, tokens, features)`` in fp64."""
    model, _, _ = traced(family)
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    hook.remove()
    return torch.cat(seen)


def weight_of(family: str, path: str) -> Tensor:
    """Shape ``(out, in)``, fp64."""
    weight = traced(family)[0].get_submodule(path).weight.detach().double()
    assert isinstance(weight, Tensor)
    return weight.T if family == "gpt2" else weight


def close(found: npt.NDArray[np.float64], wanted: Tensor, rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(found, wanted.numpy(), rtol=rtol)


def gradients(rows: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The gradient of each batch's loss of the next token, by autograd on a loss written out."""
    model, _, _ = traced("llama_gqa")
    found = []
    for batch in rows:
        model.zero_grad()
        logits = model(**batch).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).backward()
        found.append({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


def slices_of(name: str, unit: int) -> list[tuple[str, Any]]:
    """A unit's slices by hand: a kv head with its four query heads, or an MLP channel."""
    prefix = f"model.layers.{name[-1]}."
    if name.startswith("kv"):
        own, shared = slice(HEAD * unit, HEAD * (unit + 1)), slice(4 * HEAD * unit, 4 * HEAD * (unit + 1))
        rows = {"q_proj": shared, "k_proj": own, "v_proj": own}
        return [(f"{prefix}self_attn.{n}.weight", r) for n, r in rows.items()] + [
            (f"{prefix}self_attn.o_proj.weight", (slice(None), shared))
        ]
    rows_ = [(f"{prefix}mlp.{n}.weight", unit) for n in ("gate_proj", "up_proj")]
    return [*rows_, (f"{prefix}mlp.down_proj.weight", (slice(None), unit))]
