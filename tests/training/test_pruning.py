"""Progressive pruning as a run: exactly the asked number of zeros, nothing else left behind, the same bits again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_training import rounds
from shear_training.pruning import Pruned, Pruning, prune
from shear_training.saliency import DEFAULT_WEIGHTS
from tests.training.recovering import sources
from tests.training.tiny import adapted, base_groups
from tests.zoo import FAMILIES

SMALL = Pruning(rank=4, alpha=8, lr=1e-2, warmup=1, periods=2, steps=2, batch=4, save_steps=2, device="cpu")
"""Five steps; complete checkpoints after the second, which is in the middle of a period, and the fourth."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and rounding follows the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def target() -> sir.Plan:
    return sir.plan(sir.trace(FAMILIES["llama_gqa"]()), ratio=0.35)


def run(
    folder: Path, model: nn.Module | None = None, settings: Pruning = SMALL,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:  # fmt: skip
    model = FAMILIES["llama_gqa"]() if model is None else model
    return prune(model, base_groups(), target(), sources(), settings, folder, progress)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """A run that nothing disturbed."""
    return run(tmp_path_factory.mktemp("whole"))


def zeros(model: nn.Module) -> dict[str, int]:
    """How many channels and kv heads of each layer are zero in all that is theirs, read off the weights."""
    found = {}
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        mlp, attention, width = layer.mlp, layer.self_attn, layer.self_attn.head_dim
        found[f"ffn{number}"] = both_zero([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T])
        heads = [t.unflatten(0, (-1, width)).flatten(1) for t in (attention.k_proj.weight, attention.v_proj.weight)]
        queries = [
            t.unflatten(0, (len(heads[0]), -1)).flatten(1) for t in (attention.q_proj.weight, attention.o_proj.weight.T)
        ]
        found[f"kv{number}"] = both_zero([*heads, *queries])
    return found


def both_zero(tensors: list[Tensor]) -> int:
    return int(torch.stack([(t == 0).all(1) for t in tensors]).all(0).sum())


def asked() -> dict[str, int]:
    return {cut.group: cut.size - len(cut.kept) for cut in target().cuts}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Stopped

    return progress


def test_as_many_units_are_zero_as_the_plan_removes(whole: Pruned) -> None:
    assert sum(asked().values()) > 10
    assert zeros(whole.model) == {name: asked().get(name, 0) for name in zeros(whole.model)}
    assert {n: base_groups().by_name[n].size - len(kept) for n, kept in whole.kept.items()} == asked()
    assert (whole.steps, 5 * 4 * 8 < whole.tokens <= 5 * 4 * 12) == (5, True)


def test_the_model_is_the_one_that_was_given_with_nothing_left_on_it(tmp_path: Path) -> None:
    model = FAMILIES["llama_gqa"]()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes, config = set(vars(model)), model.config.to_dict()  # type: ignore[operator, union-attr]
    before["model.norm.weight"] = model.model.norm.weight.requires_grad = False  # type: ignore[union-attr]
    done = run(tmp_path, model)
    assert done.model is model
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert (set(vars(model)), model.config.to_dict(), model.training) == (attributes, config, False)  # type: ignore[operator, union-attr]


def test_adapters_that_a_model_brings_are_trained_and_merged(tmp_path: Path) -> None:
    model = adapted(targets=("q_proj", "up_proj"), lora_dropout=0.3)
    base, before = model.get_base_model(), FAMILIES["llama_gqa"]().state_dict()
    done = run(tmp_path, model)
    assert done.model is base
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in base.modules())
    assert zeros(base) == {name: asked().get(name, 0) for name in zeros(base)}
    kept = int(done.kept["ffn0"][0])
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    assert torch.equal(base.state_dict()[gate][kept], before[gate][kept])
    assert not torch.equal(base.state_dict()[up][kept], before[up][kept])
    assert all(parameter.requires_grad for parameter in base.parameters()) is False


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, whole: Pruned, step: int) -> None:
    model = FAMILIES["llama_gqa"]()
    with pytest.raises(Stopped):
        run(tmp_path, model, progress=stop_at(step))
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.manual_seed(99)
    seen: list[int] = []
    again = run(tmp_path, progress=lambda done, total: seen.append(done))
    assert seen[0] == {1: 1, 3: 3, 4: 3, 5: 5}[step]
    assert same(again.model, whole.model)
    assert {n: k.tolist() for n, k in again.kept.items()} == {n: k.tolist() for n, k in whole.kept.items()}


def test_a_finished_run_is_read_from_its_last_checkpoint(tmp_path: Path, whole: Pruned) -> None:
    run(tmp_path)
    seen: list[int] = []
    assert same(run(tmp_path, progress=lambda done, total: seen.append(done)).model, whole.model)
    assert seen == []


def test_a_loss_that_is_no_number_is_refused_and_the_model_has_no_adapters(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rounds, "_LOG_EVERY", 2)
    model = FAMILIES["llama_gqa"]()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="the training loss is not a number at step 1: pruning stops here; a lower lr"):
        run(tmp_path, model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_nothing_to_remove_is_a_run_like_any_other(tmp_path: Path) -> None:
    none = replace(target(), cuts=())
    done = prune(FAMILIES["llama_gqa"](), base_groups(), none, sources(), SMALL, tmp_path)
    assert (dict(done.kept), done.steps) == ({}, 5)
    assert set(zeros(done.model).values()) == {0}


def test_where_and_how_often_to_save_is_no_part_of_the_digest() -> None:
    assert replace(SMALL, device="cuda", save_steps=7).digest == SMALL.digest
    others = {"rank": 5, "lr": 1e-3, "batch": 6, "periods": 3, "eps": 0.5, "compete": True, "seed": 1, "bf16": True}
    assert len({replace(SMALL, **{name: value}).digest for name, value in others.items()} | {SMALL.digest}) == 9  # type: ignore[arg-type]
    assert replace(SMALL, criteria={**DEFAULT_WEIGHTS, "cosine": 2.0}).digest != SMALL.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"criteria": {"luck": 1.0}}, "luck"),
        ({"periods": 0}, "there is at least one period of one step, not 0 of 2"),
        ({"lr": 1e38}, "lr of a recovery is at most 1,000,000, not 1e.38"),
        ({"lr": -1.0}, "lr of a recovery is a positive number, not -1.0"),
        ({"batch": 0}, "batch of a recovery is at least 1, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        replace(SMALL, **change)
