"""Statistics of what consumers read, against the values themselves, all kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_passes.importance import statistics
from shear_passes.importance.calibration import Calibration, Data
from shear_passes.importance.statistics import CalibrationStatistics, Moments, ReadStatistics
from tests.calibrated import traced


def batches(count: int = 3, length: int = 9) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 60, (2 + n, length + n), generator=draw)} for n in range(count)]


def read(model: nn.Module | str, data: Any, **options: Any) -> CalibrationStatistics:
    """Statistics of a model, or of a family that is traced once for all tests."""
    model, program = traced(model)[:2] if isinstance(model, str) else (model, sir.trace(model))
    manager = sir.analyses(program).fork(None, without=(ReadStatistics, Data))
    manager.put(Data(), Calibration(model, data))
    return manager.get(ReadStatistics(**options))


def inputs_of(model: nn.Module, path: str, data: Any, feature: int = -1) -> list[Tensor]:
    """Every input of a module, features last."""
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].movedim(feature, -1).double()))
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return seen


def agree(moments: Moments, seen: list[Tensor]) -> None:
    """Two passes over all that was kept."""
    flat = torch.cat([x.flatten(0, -2) for x in seen])
    assert moments.count == len(flat)
    torch.testing.assert_close(moments.mean, flat.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments.variance, flat.var(0, correction=0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(moments.squares, flat.square().sum(0), rtol=1e-5, atol=1e-9)
    if moments.gram is not None:
        torch.testing.assert_close(moments.gram, flat.T @ flat, rtol=1e-4, atol=1e-5)
    rows = torch.cat([x.flatten(1, -2).abs().mean(1) for x in seen])
    torch.testing.assert_close(moments.row_means, rows.square().sum(0), rtol=1e-5, atol=1e-9)


PLACES = [
    ("llama_gqa", "model.layers.1.mlp.down_proj", -1),
    ("llama_gqa", "model.layers.0.self_attn.o_proj", -1),
    ("llama_mqa", "lm_head", -1),
    ("gpt2", "transformer.h.1.mlp.c_proj", -1),
    ("bert", "bert.encoder.layer.0.output.dense", -1),
    ("resnet", "stages.1.conv2", 1),
    ("depthwise_separable", "depthwise.0", 1),
    ("depthwise_separable", "project.0", 1),
]


@pytest.mark.parametrize(("family", "path", "feature"), PLACES)
def test_the_moments_are_those_of_everything_that_was_read(family: str, path: str, feature: int) -> None:
    model = traced(family)[0]
    data: Any = [torch.randn(n, 3, 12, 12) for n in (2, 3)] if feature == 1 else batches()
    weight = next(n for n, p in model.named_parameters() if p is model.get_submodule(path).weight)
    agree(read(family, data, gram=True)[weight, 0 if family == "gpt2" else 1], inputs_of(model, path, data, feature))


def test_stacked_experts_are_watched_by_the_products_they_take_part_in() -> None:
    model = traced("mixtral")[0]
    data = batches()
    found = read("mixtral", data)["model.layers.0.mlp.experts.down_proj", 2]
    seen = inputs_of(model, "model.layers.0.mlp.experts", data)
    # Each token goes to three experts.
    assert found.count == 3 * sum(x[..., 0].numel() for x in seen)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_are_read_alike_however_they_are_run(implementation: str) -> None:
    model: Any = traced("olmoe")[0]
    key = ("model.layers.0.mlp.experts.down_proj", 2)
    one = read("olmoe", batches())[key]
    before = model.config._experts_implementation
    model.set_experts_implementation(implementation)
    try:
        other = read("olmoe", batches())[key]
    finally:
        model.set_experts_implementation(before)
    assert one.count == other.count
    torch.testing.assert_close(one.squares, other.squares, rtol=1e-4, atol=1e-8)


def test_padding_is_left_out() -> None:
    model = "llama_gqa"
    ids = batches(1)[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, -4:] = 0
    key = ("model.layers.1.mlp.down_proj.weight", 1)
    plain = read(model, [{"input_ids": ids}])[key]
    masked = read(model, [{"input_ids": padded, "attention_mask": mask}])[key]
    assert masked.count == plain.count == 18
    torch.testing.assert_close(masked.variance, plain.variance, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(masked.row_means, plain.row_means, rtol=1e-4, atol=1e-8)


def test_a_large_mean_does_not_eat_a_small_variance() -> None:
    x = 1000.0 + torch.randn(4, 50, 3)
    moments = Moments()
    for part in x:
        moments.update(part[None])
    torch.testing.assert_close(moments.variance, x.double().flatten(0, 1).var(0, correction=0), rtol=1e-5, atol=0)


def test_what_reads_the_same_values_shares_its_statistics() -> None:
    found = read("llama_gqa", batches(1))
    q, k, gate = (
        found[f"model.layers.0.{name}.weight", 1] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    )
    assert q is k
    assert q is not gate


def test_a_layer_that_is_used_twice_is_read_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x + self.down(torch.relu(self.up(x))))))

    model = Twice()
    data = [torch.randn(3, 7, 6)]
    found = read(model, data)["down.weight", 1]
    assert found.count == 2 * 3 * 7
    agree(found, inputs_of(model, "down", data))


def live() -> int:
    gc.collect()
    return sum(t.numel() for t in gc.get_objects() if issubclass(type(t), Tensor))


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    held: dict[int, int] = {}

    def stream(count: int) -> Iterator[dict[str, Tensor]]:
        for n in range(count):
            if n in (2, count - 1):
                held[n] = live()
            yield {"input_ids": torch.randint(3, 60, (2, 11))}

    read("llama_gqa", stream(30), gram=True)
    assert held[29] == held[2]


def test_an_iterator_that_was_read_is_said_to_be_empty() -> None:
    with pytest.raises(PlanError, match="has no batch; an iterator can be read only once"):
        read("mlp", iter([]))


def test_without_data_a_statistic_says_what_it_wants() -> None:
    with pytest.raises(PlanError, match="looks at data: pass data=batches"):
        sir.analyses(traced("mlp")[1]).get(ReadStatistics())


def test_the_model_is_left_as_it_was() -> None:
    model = traced("llama_gqa")[0].train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    read("llama_gqa", batches(1))
    assert model.training
    model.eval()
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())


def test_many_sequences_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, valid = torch.randn(7, 5, 4) + 3, torch.rand(7, 5) > 0.3
    valid[2] = False
    whole, parts = Moments(), Moments()
    whole.update(x, valid, gram=True)
    monkeypatch.setattr(statistics, "_AT_ONCE", 2 * 5 * 4)
    parts.update(x, valid, gram=True)
    assert (parts.count, parts.rows) == (whole.count, whole.rows) == (int(valid.sum()), 6)
    for name in ("mean", "deviations", "row_means", "gram"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("labels", [False, True])
def test_logits_that_nothing_reads_are_not_made(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, *_ = traced("llama_gqa")
    data = [{**batch, **({"labels": batch["input_ids"]} if labels else {})} for batch in batches()]
    expected = inputs_of(model, "lm_head", data)
    head, product, made = model.lm_head.weight, nn.functional.linear, []
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "linear", lambda x, w, *b: made.append(w is head) or product(x, w, *b))
        found = read(model, data)
    assert made
    assert not any(made)
    agree(found["lm_head.weight", 1], expected)
    assert "forward" not in vars(model.lm_head)
