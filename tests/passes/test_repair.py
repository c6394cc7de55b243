"""Repair: consumers learn to do without what goes; against regressions and functions that know nothing of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_ir.manager import PassManager
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.importance import Random
from shear_passes.importance.calibration import Calibration, Data
from shear_passes.repair import FlapBias, LeastSquares
from shear_passes.rewrite import Shear
from shear_passes.select import SelectUniform, build_plan
from tests.passes.test_statistics import batches, inputs_of
from tests.zoo import build


def units(model: nn.Module, **kept: list[int]) -> sir.Plan:
    """A plan that keeps these units."""
    program = sir.trace(model)
    groups = sir.groups(program)
    chosen = {groups.by_name[name]: np.array(indices) for name, indices in kept.items()}
    return build_plan(groups, sir.analyses(program).get(MeasureCosts()), chosen)


def half(model: nn.Module, *names: str) -> sir.Plan:
    found = sir.groups(sir.trace(model)).by_name
    return units(model, **{n: list(range(0, found[n].size, 2)) for n in names})


def lost(model: Any, small: Any, path: str, data: Any) -> float:
    """The squared error of what ``path`` makes, over all tokens."""
    made: list[list[Tensor]] = []
    for each in (model, small):
        seen: list[Tensor] = []
        handle = each.get_submodule(path).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            for batch in data:
                each(**batch)
        handle.remove()
        made.append(seen)
    return float(sum((a - b).double().square().sum() for a, b in zip(*made, strict=True)))


@pytest.mark.parametrize(
    ("name", "group", "weight", "path", "turned"),
    [
        ("llama_gqa", "ffn1", "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj", False),
        ("llama_gqa", "kv1", "model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj", False),
        ("gpt2", "ffn1", "transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj", True),
    ],
)
def test_the_new_weight_is_the_ridge_solution(name: str, group: str, weight: str, path: str, turned: bool) -> None:
    """Against the minimiser over all tokens at once, by augmented rows and a plain least-squares solver."""
    model, data = build(name), batches()
    plan = half(model, group)
    got = sir.repair(model, plan, LeastSquares(ridge=0.03), data=data).get_parameter(weight).double()
    got, old = (w.T if turned else w for w in (got, model.get_parameter(weight).double()))
    x = torch.cat([t.flatten(0, -2) for t in inputs_of(model, path, data)])
    keep = torch.as_tensor(plan.kept[weight][0 if turned else 1])
    bias = getattr(model.get_submodule(path), "bias", None)
    goal = x @ old.T
    inner = x[:, keep]
    if bias is not None:
        goal, inner = goal - goal.mean(0), inner - inner.mean(0)
    weight_ = (0.03 * inner.square().sum(0).mean()).sqrt()
    rows = torch.cat([inner, weight_ * torch.eye(len(keep))])
    wanted = torch.cat([goal, weight_ * old[:, keep].T])
    solution = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(got[:, keep], solution, atol=1e-5)


def test_a_cut_of_nothing_changes_nothing() -> None:
    model = build("llama_gqa")
    found = sir.groups(sir.trace(model)).by_name["ffn0"]
    plan = units(model, ffn0=list(range(found.size - 1)))
    whole = replace(plan, cuts=(), kept={})
    repaired = sir.repair(model, whole, LeastSquares(), data=batches(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repaired.parameters(), strict=True))


class Doubled(nn.Module):
    """Its later channels are combinations of the first three, for every input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 6, bias=False)
        with torch.no_grad():
            mixed = torch.randn(5, 3)
            self.up.weight[3:] = mixed @ self.up.weight[:3]
            self.up.bias[3:] = mixed @ self.up.bias[:3]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))  # type: ignore[no-any-return]


def test_what_others_say_already_is_no_loss() -> None:
    model, data = Doubled().eval(), [torch.randn(4, 7, 5) for _ in range(3)]
    program = sir.trace(model, torch.randn(2, 3, 5))
    group = next(g for g in sir.groups(program) if g.size == 8)
    plan = build_plan(sir.groups(program), sir.analyses(program).get(MeasureCosts()), {group: np.arange(3)})
    repaired = sir.repair(model, plan, LeastSquares(ridge=1e-9), data=data, inputs=torch.randn(2, 3, 5))
    small = sir.shear(repaired, plan, inputs=torch.randn(2, 3, 5))
    x = torch.randn(9, 2, 5)
    assert torch.allclose(small(x), model(x), atol=1e-5)
    assert not torch.allclose(sir.shear(model, plan, inputs=torch.randn(2, 3, 5))(x), model(x), atol=1e-2)


class Tied(nn.Module):
    """Its head reads with the table that its tokens come from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(13, 6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.table(ids)))) @ self.table.weight.T


def test_a_table_that_tokens_come_from_as_well_stays_as_it_is() -> None:
    model, data = Tied().eval(), [torch.randint(13, (4, 7)) for _ in range(2)]
    program = sir.trace(model, data[0])
    group = next(g for g in sir.groups(program) if g.size == 6)
    plan = build_plan(sir.groups(program), sir.analyses(program).get(MeasureCosts()), {group: np.arange(4)})
    repaired = sir.repair(model, plan, data=data, inputs=data[0])
    changed = {n for n, p in repaired.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {"up.weight", "up.bias"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama_gqa", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("bert", "bert.encoder.layer.1.output.dense"),
    ],
)
def test_every_layer_alone_loses_less_and_the_result_is_sound(name: str, path: str) -> None:
    model, data = build(name), batches(8, 20)
    plan = half(model, "ffn1")
    repaired = sir.repair(model, plan, data=data)
    small = sir.shear(repaired, plan)
    sir.verify(repaired, small, plan).raise_if_unsound()
    assert lost(model, small, path, data) < 0.9 * lost(model, sir.shear(model, plan), path, data)
    assert {n: p.shape for n, p in repaired.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_bias_carries_the_mean_of_what_goes() -> None:
    model, data = build("gpt2"), batches()
    plan = half(model, "ffn0")
    path = "transformer.h.0.mlp.c_proj"
    repaired = sir.repair(model, plan, FlapBias(), data=data)
    x = torch.cat([t.flatten(0, -2) for t in inputs_of(model, path, data)])
    gone = np.setdiff1d(np.arange(x.shape[1]), plan.kept[f"{path}.weight"][0])
    old = model.get_submodule(path)
    expected = old.bias.double() + x.mean(0)[gone] @ old.weight[gone].double()
    assert torch.allclose(repaired.get_parameter(f"{path}.bias").double(), expected, atol=1e-6)
    assert torch.equal(repaired.get_parameter(f"{path}.weight"), old.weight)


def test_a_bias_that_is_not_there_is_asked_for() -> None:
    model = build("llama_gqa")
    with pytest.raises(PlanError, match=r"down_proj\.weight has no bias that could carry what is lost"):
        sir.repair(model, half(model, "ffn0"), FlapBias(), data=batches(1))
    with pytest.raises(PlanError, match="ridge of least squares is a positive number, not 0"):
        sir.repair(model, half(model, "ffn0"), LeastSquares(ridge=0.0), data=batches(1))


def test_biases_are_given_by_the_config_and_take_what_is_lost(tmp_path: Path) -> None:
    """Llama has none of its own; with a switch of its config, stock transformers load the result."""
    model, data = build("llama_gqa"), batches(6, 20)
    other = sir.with_biases(model)
    assert (other.config.attention_bias, other.config.mlp_bias) == (True, True)
    plan = half(other, "ffn0", "ffn1")
    repaired = sir.repair(other, plan, "flap-bias", data=data)
    small = sir.shear(repaired, plan)
    sir.verify(repaired, small, plan).raise_if_unsound()
    assert sir.save(small, tmp_path / "small").stock
    path = "model.layers.0.mlp.down_proj"
    assert lost(model, small, path, data) < lost(model, sir.shear(model, half(model, "ffn0", "ffn1")), path, data)
    with pytest.raises(PlanError, match=r"the config of Qwen3ForCausalLM has no switch that gives .*down_proj a bias"):
        sir.with_biases(build("qwen3"))


def test_as_a_pass_between_a_selection_and_shear_it_is_the_same_repair() -> None:
    model, data = build("llama_gqa"), batches()
    program = sir.trace(model)
    plan = sir.plan(program, ratio=0.2, importance=Random(1))
    manager = PassManager([SelectUniform(ratio=0.2, importance=Random(1)), LeastSquares(), Shear()])
    result = manager.run(program, dict(model.named_parameters()), given={Data(): Calibration(model, data)})
    small = sir.shear(sir.repair(model, plan, data=data), plan)
    mine = result.analyses.weights
    assert mine is not None
    assert all(torch.equal(mine[n], p) for n, p in small.named_parameters())
