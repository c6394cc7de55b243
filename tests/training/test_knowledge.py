"""Knowledge distribution: planted sensitivity is found, weights are put back, results survive a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from shear_ir.errors import PlanError
from shear_training.knowledge import Knowledge, measure_knowledge
from tests.training.tiny import base_groups, tokens
from tests.zoo import FAMILIES


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["llama_gqa"]()


def nll(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens(), labels=tokens()).loss)


def test_every_weight_is_put_back_bit_for_bit(model: nn.Module) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = measure_knowledge(model, base_groups(), nll)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [g.group for g in found.groups] == [g.name for g in base_groups() if g.kind in ("ffn", "kv_head")]
    assert all(any(g.deviations) for g in found.groups)


def test_weights_are_put_back_when_the_loss_raises(model: nn.Module) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    calls = iter(range(3))

    def failing(model: nn.Module) -> float:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return nll(model)

    with pytest.raises(KeyboardInterrupt):
        measure_knowledge(model, base_groups(), failing)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_deviation_is_the_growth_of_the_loss_without_the_weakest_units(model: nn.Module) -> None:
    found = measure_knowledge(model, base_groups(), nll, kinds=("ffn",), ratios=(0.25,))
    full = nll(model)
    mlp = model.get_submodule("model.layers.1.mlp")
    parts = [(mlp.gate_proj.weight, 0), (mlp.up_proj.weight, 0), (mlp.down_proj.weight, 1)]  # type: ignore[union-attr]
    squares = sum(p.detach().square().sum(1 - d) for p, d in parts)  # type: ignore[operator, arg-type]
    weakest = torch.argsort(squares)[:11]  # type: ignore[arg-type]
    with torch.no_grad():
        for weight, dim in parts:
            weight.index_fill_(dim, weakest, 0)  # type: ignore[operator]
    assert found.groups[1].deviations[0] == pytest.approx(nll(model) - full, rel=1e-4)
    assert found.loss == full


def test_a_planted_sensitive_layer_ranks_first_and_is_the_one_frozen(model: nn.Module) -> None:
    with torch.no_grad():
        for other in ("0.mlp.down_proj", "0.self_attn.o_proj", "1.self_attn.o_proj"):
            model.get_submodule(f"model.layers.{other}").weight.mul_(1e-2)  # type: ignore[operator, union-attr]
        own = model(input_ids=tokens()).logits.argmax(-1)  # what the whole model says is the truth

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(input_ids=tokens()).logits.flatten(0, 1), own.flatten()))

    found = measure_knowledge(model, base_groups(), loss, share=0.25)
    assert found.ranked()[0].group == "ffn1"
    assert found.frozen == ("ffn1",)


def test_none_or_all_groups_can_be_frozen(model: nn.Module) -> None:
    found = measure_knowledge(model, base_groups(), nll, ratios=(0.5,))
    assert found.with_share(0.0).frozen == ()
    assert len(found.with_share(1.0).frozen) == 4
    with pytest.raises(PlanError, match="between 0 and 1"):
        found.with_share(1.5)


def test_a_loss_that_is_not_a_number_is_the_worst(model: nn.Module, tmp_path: Path) -> None:
    losses: Iterator[float] = iter([1.0, 5.0, math.nan, 9.0, 2.0])
    found = measure_knowledge(model, base_groups(), lambda _: next(losses), ratios=(0.5,), share=0.25)
    assert found.frozen == (found.groups[1].group,)
    found.save(tmp_path / "k.json")
    assert Knowledge.load(tmp_path / "k.json") == found


def test_what_is_measured_is_not_measured_again(model: nn.Module, tmp_path: Path) -> None:
    calls = 0

    def counted(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return nll(model)

    with pytest.raises(KeyboardInterrupt):
        measure_knowledge(model, base_groups(), counted, ratios=(0.5,), resume=tmp_path / "k.json")
    found = measure_knowledge(model, base_groups(), counted, ratios=(0.5,), resume=tmp_path / "k.json")
    assert calls == 4 + 2
    assert found == measure_knowledge(model, base_groups(), nll, ratios=(0.5,))


@pytest.mark.parametrize(("text", "says"), [("{}", "format"), ("[", "Invalid JSON")])
def test_another_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text(text)
    with pytest.raises(PlanError, match=says):
        Knowledge.load(tmp_path / "k.json")
