"""Recovery: what a round does, when it stops, what it refuses, and that a stopped one ends with the same bits."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_training import recovery as module
from shear_training import rounds
from shear_training.data import Source
from shear_training.lora import adapter_tensors, attach, detach, linear_names
from shear_training.mixture import weights
from shear_training.recovery import Recovered, Recovery, recover
from tests.training.recovering import SMALL, counting, dense, losses, run, small, sources, stopper
from tests.zoo import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
ONE = replace(SMALL, max_rounds=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and rounding follows the number of threads.

    Trainer collects garbage when it begins, which takes long where so much is imported: that is frozen.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recovered:
    """A recovery that nothing disturbed."""
    return run(tmp_path_factory.mktemp("whole"))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def same(one: Recovered, other: Recovered) -> bool:
    """Whether two recoveries are the same but for their seconds."""
    kept = [r.to_json() for r in (one, other)]
    for each in kept:
        for told in each["rounds"]:
            del told["seconds"]
    a, b = tensors(one.model), tensors(other.model)
    return kept[0] == kept[1] and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


def stop() -> None:
    raise Stopped


def test_every_source_is_better_after_it_than_before(whole: Recovered) -> None:
    assert whole.baseline == losses(small())
    assert whole.losses == pytest.approx(losses(whole.model), rel=1e-5)
    assert all(whole.losses[name] < whole.baseline[name] - 0.1 for name in whole.losses)
    assert (whole.best, whole.stopped) == (2, "max rounds")


def test_a_round_is_told_in_numbers(whole: Recovered) -> None:
    for number, told in enumerate(whole.rounds):
        assert told.before == (whole.rounds[number - 1].after if number else whole.baseline)
        assert told.deviations == {name: max(0.0, nll - dense()[name]) for name, nll in told.before.items()}
        assert told.weights == weights(told.deviations, 0.2)
        assert (sum(told.rows.values()), told.steps) == (16, 4)
        assert 2 * 16 * 8 < told.tokens < 2 * 16 * 12
    first = whole.rounds[0]
    assert first.rows["up"] > first.rows["by3"]
    assert json.loads(json.dumps(whole.to_json())) == whole.to_json()


def test_the_model_is_the_one_that_was_given_with_nothing_left_on_it(tmp_path: Path) -> None:
    model = small()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes, config = set(vars(model)), model.config.to_dict()
    done = run(tmp_path / "work", ONE, model=model)
    assert done.model is model
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert (set(vars(model)), model.config.to_dict(), model.training) == (attributes, config, False)
    assert sir.save(model, tmp_path / "out").stock
    assert losses(sir.load(tmp_path / "out")) == losses(model)


@pytest.mark.parametrize(("what", "at"), [("round 1", 1), ("round 2", 3), ("measuring up", 6)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, whole: Recovered, what: str, at: int) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, progress=stopper(what, at, stop))
    torch.manual_seed(99)
    assert same(run(tmp_path), whole)


def test_the_last_checkpoint_of_a_round_is_enough_to_end_it(tmp_path: Path, whole: Recovered, monkeypatch: Any) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "finite", lambda _: stop())
        with pytest.raises(Stopped):
            run(tmp_path)
    assert (tmp_path / "round-1" / "checkpoint-4" / rounds.COMPLETE).is_file()
    steps: list[tuple[str, int]] = []
    assert same(run(tmp_path, progress=lambda what, done, _: steps.append((what, done))), whole)
    assert ("recovery: round 1", 1) not in steps
    assert ("recovery: round 2", 1) in steps


def test_a_checkpoint_that_was_being_written_is_not_read(tmp_path: Path, whole: Recovered) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, progress=stopper("round 1", 4, stop))
    torn = tmp_path / "round-1" / "checkpoint-2"
    (torn / rounds.COMPLETE).unlink()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    assert same(run(tmp_path), whole)


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_round_costs_nothing(tmp_path: Path, whole: Recovered) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "passes", "backends", "tools"))
    killed = subprocess.run(
        [sys.executable, "-m", "tests.training.recovering", str(tmp_path)], cwd=ROOT, check=False, capture_output=True,
        env={**os.environ, "PYTHONPATH": path}, timeout=240,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert (tmp_path / "round-2" / "checkpoint-2" / rounds.COMPLETE).is_file()
    assert same(run(tmp_path), whole)


def test_a_finished_run_is_only_read(tmp_path: Path, whole: Recovered) -> None:
    run(tmp_path)
    seen: list[Any] = []
    assert same(run(tmp_path, progress=lambda *told: seen.append(told)), whole)
    assert seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-2.safetensors", "state.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": replace(ONE, lr=1e-3)}, "begun with other settings"),
        ({"sources": {**sources(), "up": Source("up", counting(1, 19, 0), counting(1, 6, 20))}}, "begun with other data"),
        ({"stage": "second"}, "begun with other data"),
        ({"dense": {"up": 1.0, "by3": 2.5}}, "begun with other losses of the dense model"),
        ({"model": 1}, r"begun with other weights \(of another model or plan\)"),
    ],
)  # fmt: skip
def test_the_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    given = {"model": small(), "sources": sources(), "dense": dense(), "settings": ONE, "folder": tmp_path}
    with pytest.raises(Stopped):
        recover(**given, progress=stopper("round 1", 3, stop))
    model = FAMILIES["llama_gqa"]()
    other_plan = sir.shear(model, sir.plan(sir.trace(model), ratio=0.2, importance="order"))
    with pytest.raises(PlanError, match=said):
        recover(**{**given, **(change if "model" not in change else {"model": other_plan})})


def test_a_damaged_state_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": "shear-ir recovery 1"}')
    with pytest.raises(PlanError, match=r"state\.json is no state of a recovery"):
        run(tmp_path)


def test_where_and_how_often_to_save_may_change_between_runs(tmp_path: Path, whole: Recovered) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, progress=stopper("round 2", 3, stop))
    assert same(run(tmp_path, replace(SMALL, save_steps=3)), whole)


def test_without_dynamic_weights_only_the_mixture_is_another(tmp_path: Path, whole: Recovered) -> None:
    even = run(tmp_path, replace(SMALL, dynamic=False))
    assert all(told.weights == {"up": 0.5, "by3": 0.5} for told in even.rounds)
    assert all(told.rows == {"up": 8, "by3": 8} for told in even.rounds)
    assert even.rounds[0].deviations == whole.rounds[0].deviations
    assert all(even.losses[name] < even.baseline[name] for name in even.losses)


def test_the_token_budget_is_never_overdrawn(tmp_path: Path) -> None:
    done = run(tmp_path, replace(SMALL, token_budget=450))
    assert done.stopped == "token budget"
    assert done.rounds[0].steps == 4
    assert 450 - 8 * 12 < sum(told.tokens for told in done.rounds) <= 450


def test_it_stops_when_two_rounds_running_bring_too_little(tmp_path: Path) -> None:
    done = run(tmp_path, replace(SMALL, max_rounds=9, lr=1e-7, tolerance=0.005))
    assert (done.stopped, len(done.rounds)) == ("converged", 2)


def scripted(monkeypatch: Any, *told: float) -> None:
    """Measurements as told, before the first round and after each."""
    script = iter(told)
    monkeypatch.setattr(module._Stage, "_measure", lambda _: dict.fromkeys(sources(), next(script)))


def test_the_best_round_is_kept_and_not_the_last(tmp_path: Path, monkeypatch: Any) -> None:
    even = replace(SMALL, dynamic=False)
    first = run(tmp_path / "first", replace(even, max_rounds=1))
    scripted(monkeypatch, 1.0, 0.8, 0.9)
    done = run(tmp_path / "both", even)
    assert (done.best, done.losses) == (1, {"up": 0.8, "by3": 0.8})
    assert all(torch.equal(tensor, tensors(first.model)[name]) for name, tensor in tensors(done.model).items())


def test_a_model_that_no_round_has_bettered_stays_as_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    scripted(monkeypatch, 1.0, 1.5, 1.2)
    done = run(tmp_path)
    assert (done.best, len(done.rounds), done.losses) == (0, 2, done.baseline)
    assert all(torch.equal(tensor, tensors(small())[name]) for name, tensor in tensors(done.model).items())


def test_a_round_that_diverges_is_thrown_away(tmp_path: Path, monkeypatch: Any) -> None:
    def poisoned(model: nn.Module, *args: Any) -> int:
        steps = rounds.train(model, *args)
        if args[3].name == "round-2":
            with torch.no_grad():
                next(iter(adapter_tensors(model).values())).fill_(math.nan)
        return steps

    monkeypatch.setattr(module, "train", poisoned)
    done = run(tmp_path)
    assert done.stopped == "diverged: the loss after round 2 is not a number; the round is thrown away"
    assert (done.best, len(done.rounds)) == (1, 1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(done.model).values())
    assert losses(done.model) == pytest.approx(done.losses, rel=1e-5)


def test_a_training_loss_that_is_no_number_ends_the_round_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rounds, "_LOG_EVERY", 2)
    collate = rounds.collate
    # An input that makes every loss NaN, as an overflow in float16 does.
    monkeypatch.setattr(rounds, "collate", lambda items: collate(items) | {"logits_scale": math.nan})
    model = small()
    forward = model.forward

    def overflowing(*args: Any, logits_scale: float = 1.0, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss * logits_scale
        return output

    model.forward = overflowing
    done = run(tmp_path, model=model)
    assert done.stopped.startswith("diverged: the training loss is not a number at step 1 of round 1, which is thrown")
    assert (done.best, done.rounds) == (0, ())


def test_adapters_are_kept_when_asked(tmp_path: Path) -> None:
    kept = run(tmp_path / "work", replace(ONE, merge=False))
    merged = run(tmp_path / "other", ONE)
    assert isinstance(kept.model, PeftModel)
    assert losses(kept.model) == kept.losses
    kept.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(small(), tmp_path / "adapter").eval()
    assert losses(again) == kept.losses == merged.losses


def test_a_merge_is_rounded_once() -> None:
    model = small().to(torch.bfloat16)
    before = tensors(small().to(torch.bfloat16))
    adapted = attach(model, rank=4, alpha=8, dropout=0.0, seed=0)
    with torch.no_grad():
        for tensor in adapter_tensors(adapted).values():
            tensor.normal_(0, 0.05)
    a, b = (adapted.get_submodule(f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.default").weight for x in "AB")
    merged = tensors(detach(adapted, merge=True))["model.layers.0.mlp.up_proj.weight"]
    exact = before["model.layers.0.mlp.up_proj.weight"].float() + 2.0 * (b.float() @ a.float())
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("family", "count"), [("llama_gqa", 14), ("gpt2", 8)])
def test_adapters_go_on_what_is_linear_by_class(family: str, count: int) -> None:
    names = linear_names(FAMILIES[family]())
    assert len(names) == count
    assert "lm_head" not in names


def test_a_batch_is_the_same_in_one_step_or_in_parts(tmp_path: Path) -> None:
    plain = replace(ONE, dropout=0.0)
    parts = run(tmp_path / "a", replace(plain, micro_batch=2))
    once = run(tmp_path / "b", replace(plain, micro_batch=None))
    assert parts.losses == pytest.approx(once.losses, rel=1e-3)
    assert parts.rounds[0].steps == once.rounds[0].steps == 4


def test_bfloat16_and_gradient_checkpointing_run_and_leave_no_wrapper(tmp_path: Path) -> None:
    model = small()
    done = run(tmp_path, replace(ONE, bf16=True, gradient_checkpointing=True, dropout=0.0), model=model)
    plain = run(tmp_path / "plain", replace(ONE, dropout=0.0))
    assert done.losses == pytest.approx(plain.losses, rel=0.05)
    assert "forward" not in vars(model)
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch of a recovery is at least 1, not 0"),
        ({"dropout": 1.5}, "dropout of a recovery is a share between 0 and 1, not 1.5"),
        ({"lr": math.nan}, "lr of a recovery is a positive number, not nan"),
        ({"schedule": "soon"}, "there is no schedule 'soon'; there are "),
        ({"schedule": "warmup_stable_decay"}, "there is no schedule 'warmup_stable_decay'; there are linear, "),
        ({"schedule": "reduce_lr_on_plateau"}, "there is no schedule 'reduce_lr_on_plateau'; there are linear, "),
        ({"weight_decay": -1.0}, "weight_decay of a recovery is a number from 0 up, not -1.0"),
        ({"seed": -1}, "seed of a recovery is a whole number from 0 "),
        ({"device": "abacus"}, "a recovery runs on cpu or cuda, not on 'abacus'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        replace(SMALL, **change)


def test_what_cannot_be_recovered_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="a batch of 8 rows cannot be split into steps of 3 rows on 1 process"):
        run(tmp_path / "a", replace(SMALL, micro_batch=3))
    with pytest.raises(PlanError, match="the loss of the dense model on by3 is not known"):
        recover(small(), sources(), {"up": 1.0}, SMALL, tmp_path / "b")
    with pytest.raises(PlanError, match="this model has adapters already"):
        run(tmp_path / "c", model=attach(small(), rank=2, alpha=2, dropout=0.0, seed=0))
    broken = small()
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(PlanError, match="the loss of the model on up is no number before any training"):
        run(tmp_path / "d", model=broken)
    assert not any("lora" in name for name, _ in broken.named_parameters())


def test_the_defaults_are_the_published_recipe() -> None:
    made = Recovery()
    assert (made.rank, made.alpha, made.dropout, made.lr, made.batch, made.epochs) == (8, 16, 0.05, 1e-4, 64, 2)
    assert (made.floor, made.tolerance, made.patience) == (0.2, 0.005, 2)


def test_the_adapter_on_disk_is_that_of_the_best_round(tmp_path: Path) -> None:
    kept = run(tmp_path, replace(ONE, merge=False))
    stored = load_file(tmp_path / "adapter-1.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in kept.model.named_parameters() if "lora" in name)
