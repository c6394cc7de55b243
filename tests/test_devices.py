"""The whole road where the model lies on an accelerator, or half of it: no operator ever sees two devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_passes.importance.base import Importance
from shear_passes.importance.block_influence import BlockInfluence
from shear_passes.importance.bonsai import Bonsai
from shear_passes.importance.lora_guided import LoraGuided
from shear_passes.importance.magnitude import Magnitude
from shear_passes.importance.mini_llm import MiniLlm
from shear_passes.importance.reading import Flap, Minitron, Wanda
from shear_passes.importance.reap import Reap
from shear_passes.importance.taylor import Taylor
from shear_training import rounds
from shear_training.evaluate import evaluate, evaluate_sources
from shear_training.knowledge import measure_knowledge
from shear_training.pruning import Pruning, prune
from shear_training.recovery import Recovery, recover
from shear_training.schedule import Periods
from tests.pretend_device import Pretend
from tests.training.recovering import sources
from tests.training.tiny import adapted, base_groups, lhspg, tokens
from tests.workflow.tiny import RECIPE, run, write_data
from tests.zoo import FAMILIES

pytestmark = pytest.mark.apart

CPU = torch.device("cpu")
CRITERIA = [
    Magnitude(), Magnitude(p=1), Taylor(), Taylor(order="mixed"), Taylor(vector=True), LoraGuided(rank=2),
    Wanda(), Flap(), Minitron(), MiniLlm(directions=1), Bonsai(masks=2),
]  # fmt: skip


def data() -> list[dict[str, Tensor]]:
    """Two batches on the CPU, one of them padded."""
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    ids = torch.randint(3, 60, (2, 3, 9), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1]}]


def split(model: nn.Module, first: torch.device, second: torch.device) -> nn.Module:
    """A Llama whose second layer and head lie on another device than the rest, as accelerate would place it."""

    def bring(module: nn.Module, args: Any, kwargs: Any) -> Any:
        device = next(module.parameters()).device
        return torch.utils._pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, (args, kwargs))

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.to(first)
    for part in (inner.model.layers[1], inner.model.norm, inner.lm_head):
        part.to(second)
        part.register_forward_pre_hook(bring, with_kwargs=True)
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES["llama_gqa"]().eval()


def loss_here(outputs: Any, feed: Any) -> Tensor:
    """Of the next token, where the logits are."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, feed["input_ids"][:, 1:].flatten().to(logits.device))


def scores(model: nn.Module, criterion: Importance) -> dict[str, Any]:
    """By the group's name, for another trace of the model has groups of its own."""
    found = sir.scores(sir.trace(model), criterion, data=data(), loss=loss_here)[str(criterion)]
    return {group.name: values for group, values in found.items()}


def agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, values in found.items():
        # A cosine in float32 says of a block that turns its stream by little no more than this.
        np.testing.assert_allclose(values, wanted[name], rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_scores_are_those_of_the_cpu(pretend: Pretend, criterion: Importance) -> None:
    wanted = scores(llama(), criterion)
    agree(scores(llama().to(pretend.first), criterion), wanted)
    agree(scores(split(llama(), CPU, pretend.first), criterion), wanted)


def test_so_are_those_of_experts_and_of_blocks(pretend: Pretend) -> None:
    torch.manual_seed(0)
    model = FAMILIES["mixtral"]().eval()
    wanted = [scores(model, criterion) for criterion in (Reap(), BlockInfluence())]
    model.to(pretend.first)
    for criterion, on_the_cpu in zip((Reap(), BlockInfluence()), wanted, strict=True):
        agree(scores(model, criterion), on_the_cpu)


@pytest.mark.lengths
@pytest.mark.parametrize("placed", ["whole", "split"])
def test_a_model_is_traced_cut_checked_and_saved_there(pretend: Pretend, placed: str, tmp_path: Path) -> None:
    model = llama().to(pretend.second) if placed == "whole" else split(llama(), pretend.first, pretend.second)
    plan = sir.plan(sir.trace(model), ratio=0.3, importance=Flap(), data=data())
    for backend in ("module", "graph"):
        small = sir.shear(model, plan, backend=backend)
        assert {p.device for p in small.parameters()} == {p.device for p in model.parameters()}
        sir.verify(model, small, plan).raise_if_unsound()
    if placed == "whole":
        small = sir.shear(model, plan)
        sir.save(small, tmp_path / "out")
        again = sir.load(tmp_path / "out")
        assert all(torch.equal(p.cpu(), q) for p, q in zip(small.parameters(), again.parameters(), strict=True))


def test_repairs_and_rotations_run_there(pretend: Pretend) -> None:
    model = llama().to(pretend.first)
    plan = sir.plan(sir.trace(model), ratio=0.3, importance=Flap(), data=data())
    biased = sir.with_biases(model)
    again = sir.plan(sir.trace(biased), ratio=0.3, importance=Flap(), data=data())
    for ready in (
        sir.repair(model, plan, "least-squares", data=data()), sir.repair(biased, again, "flap-bias", data=data()),
    ):  # fmt: skip
        assert {p.device for p in ready.parameters()} == {pretend.first}
    turned = sir.rotate(model, "residual", data=data())
    ids = data()[1]["input_ids"].to(pretend.first)
    torch.testing.assert_close(turned(ids).logits.cpu(), model(ids).logits.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("places", ["whole", "the CPU first", "the CPU last"])
def test_lhspg_takes_the_steps_that_it_takes_on_the_cpu(pretend: Pretend, places: str) -> None:
    targets, periods = {"ffn0": 9, "ffn1": 9, "kv0": 1, "kv1": 1}, Periods(1, 2, 2)

    def trained(model: nn.Module) -> nn.Module:
        optimizer = lhspg(model, targets, periods)
        for number in range(6):
            ids = tokens().to(next(model.parameters()).device)
            optimizer.zero_grad()
            loss_here(model(input_ids=ids), {"input_ids": ids}).backward()
            pretend.syncs.clear()
            optimizer.step()
            assert places != "whole" or number in (0, 2, 4) or not pretend.syncs, "the host waits in an ordinary step"
        assert optimizer.zero_units() == 20
        optimizer.load_state_dict(optimizer.state_dict())
        return model.merge_and_unload()

    # In float64: Adam makes a whole step of the last place of a gradient that is nearly nothing.
    wanted = trained(adapted().double())
    if places == "whole":
        made = trained(adapted().double().to(pretend.first))
    else:
        first, second = (CPU, pretend.first) if places == "the CPU first" else (pretend.first, CPU)
        made = trained(split(adapted().double(), first, second))
    for (name, one), other in zip(made.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-7, msg=name)


def held_out() -> Any:
    return sources()["up"].validation


def test_losses_and_knowledge_are_those_of_the_cpu(pretend: Pretend) -> None:
    wanted = evaluate_sources(llama(), sources())
    for model in (llama().to(pretend.second), split(llama(), pretend.first, pretend.second)):
        for name, loss in evaluate_sources(model, sources()).items():
            assert loss.nll == pytest.approx(wanted[name].nll, rel=1e-6)

    def knowledge(model: nn.Module) -> list[float]:
        measured = measure_knowledge(model, base_groups(), lambda m: evaluate(m, held_out()).nll, ratios=(0.5,))
        return [group.mean for group in measured.groups]

    wanted_here = knowledge(llama())
    assert knowledge(split(llama(), pretend.first, pretend.second)) == pytest.approx(wanted_here, rel=1e-4, abs=1e-6)


def test_pruning_and_recovery_run_there_under_trainer(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sir.plan(sir.trace(llama()), ratio=0.35, importance=Magnitude())
    few = Pruning(rank=4, alpha=8, lr=1e-2, warmup=1, periods=2, steps=2, batch=4, save_steps=2)
    short = Recovery(rank=4, alpha=8, lr=1e-2, batch=4, rows_per_round=8, epochs=1, max_rounds=1)

    def road(where: str) -> tuple[nn.Module, nn.Module]:
        pruned = prune(llama(), base_groups(), plan, sources(), few, tmp_path / where / "pruned")
        small = sir.shear(llama(), plan)
        done = recover(small, sources(), dict.fromkeys(sources(), 1.0), short, tmp_path / where / "recovered")
        return pruned.model, done.model

    wanted = road("cpu")
    _use(pretend.first, monkeypatch)
    for made, there in zip(road("there"), wanted, strict=True):
        assert {p.device for p in made.parameters()} == {pretend.first}
        for (name, one), other in zip(made.named_parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-6, msg=name)


def _use(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer and all that asks accelerate take ``device`` for the GPU."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
    monkeypatch.setattr(rounds, "on_cpu", lambda device: False)


@pytest.mark.slow
def test_the_whole_command_runs_there(pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criteria = {"magnitude": 1.0, "flap": 1.0}
    recipe = replace(
        RECIPE, pruning=replace(RECIPE.pruning, device=None, criteria=criteria, repair="least-squares"),
        recovery=replace(RECIPE.recovery, device=None),
    )  # fmt: skip
    there = write_data(tmp_path / "data")
    wanted = run(tmp_path / "cpu", there, recipe=recipe)
    _use(pretend.first, monkeypatch)
    model = llama()
    made = run(tmp_path / "there", there, recipe=recipe, model=model)
    assert {p.device for p in model.parameters()} == {pretend.first}
    assert [cut.kept.tolist() for cut in made.plan.cuts] == [cut.kept.tolist() for cut in wanted.plan.cuts]
    for name, loss in wanted.report["losses"]["tuning"].items():
        assert made.report["losses"]["tuning"][name]["nll"] == pytest.approx(loss["nll"], rel=1e-3)
