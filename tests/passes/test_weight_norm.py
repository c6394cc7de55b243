"""Normalised weights ``g * v / |v|``: what a cut leaves of them is what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_ir.plans import Plan
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.rewrite.cuts import build_plan
from shear_training.units import Units
from tests.golden import expect
from tests.ops.typed import typed

Norm = Callable[[nn.Module], nn.Module]

NORMS = {
    "rows": parametrizations.weight_norm,
    "columns": lambda module: parametrizations.weight_norm(module, dim=1),
    "all": lambda module: parametrizations.weight_norm(module, dim=None),
}


class Vocoder(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(3, 12, 5, padding=2))
        self.up = norm(nn.ConvTranspose1d(12, 10, 4, stride=2))
        self.each = norm(nn.Conv1d(10, 10, 3, groups=10))
        self.last = norm(nn.Conv1d(10, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.each(self.up(self.first(x).relu()).tanh()).relu())
        return out


SOUND = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(1))


def cut(model: nn.Module, **units: list[int]) -> Plan:
    program = sir.trace(model, SOUND)
    groups = sir.groups(program)
    kept = {groups.by_name[n]: np.setdiff1d(np.arange(groups.by_name[n].size), gone) for n, gone in units.items()}
    return build_plan(groups, sir.analyses(program).get(MeasureCosts()), kept)


def vocoder(norm: str) -> Vocoder:
    torch.manual_seed(0)
    model = Vocoder(NORMS[norm]).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("original0"):
            tensor.data.mul_(torch.linspace(0.5, 2.0, tensor.numel()).reshape(tensor.shape))
    return model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["module", "graph"])
def test_what_is_left_of_a_weight_is_what_it_was(norm: str, backend: str) -> None:
    model = vocoder(norm)
    plan = cut(model, c0=[1, 4, 5, 11], c2=[0, 7])
    assert plan.gains.keys() == {f"{n}.parametrizations.weight.original0" for n in ("first", "up", "each", "last")}
    small = sir.shear(model, plan, backend=backend, inputs=SOUND)  # type: ignore[arg-type]  # a Literal
    expected = Vocoder(lambda module: module)
    for name in ("first", "up", "each", "last"):
        whole, plain = model.get_submodule(name), expected.get_submodule(name)
        weight, bias = whole.weight.detach().clone(), whole.bias.detach().clone()  # type: ignore[union-attr, operator]
        kept = plan.kept.get(f"{name}.parametrizations.weight.original1", {})
        for dim, stays in kept.items():
            weight.index_fill_(dim, torch.from_numpy(np.setdiff1d(np.arange(weight.shape[dim]), stays)), 0)
        for dim, stays in plan.kept.get(f"{name}.bias", {}).items():
            bias.index_fill_(dim, torch.from_numpy(np.setdiff1d(np.arange(bias.shape[dim]), stays)), 0)
        plain.load_state_dict({"weight": weight, "bias": bias})
    found = small(SOUND)
    torch.testing.assert_close(found if isinstance(found, Tensor) else found[0], expected(SOUND))
    sir.verify(model, small, plan, SOUND).raise_if_unsound()


def test_the_tensors_themselves_are_smaller_and_the_module_is_what_it_was() -> None:
    model = vocoder("rows")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = sir.shear(model, cut(model, c0=[2, 3]), inputs=SOUND)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.named_parameters() if name.startswith("up")}
    assert shapes == {
        "up.bias": (10,),
        "up.parametrizations.weight.original0": (10, 1, 1),
        "up.parametrizations.weight.original1": (10, 10, 4),
    }
    assert (small.first.out_channels, small.up.in_channels) == (10, 10)  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_is_saved_loaded_and_cut_again(tmp_path: Path) -> None:
    model = vocoder("rows")
    small = sir.shear(model, cut(model, c0=[0, 9]), inputs=SOUND)
    sir.save(small, tmp_path / "once")
    again = sir.load(tmp_path / "once", model)
    assert torch.equal(again(SOUND), small(SOUND))
    plan = cut(again, c0=[1], c1=[5])
    twice = sir.shear(again, plan, inputs=SOUND)
    sir.verify(again, twice, plan, SOUND).raise_if_unsound()
    sir.save(twice, tmp_path / "twice")
    assert torch.equal(sir.load(tmp_path / "twice", model)(SOUND), twice(SOUND))


def test_a_plan_says_which_gains_follow_and_is_not_believed_when_it_says_others() -> None:
    model = vocoder("rows")
    plan = cut(model, c0=[1, 2])
    assert Plan.from_json(plan.to_json()).gains == plan.gains
    lying = Plan.from_json(plan.to_json().replace('"up.parametrizations.weight.original0": "up', '"up.bias": "up'))
    with pytest.raises(PlanError, match="its gains are not those of the normalised weights that it cuts"):
        sir.shear(model, lying, inputs=SOUND)


class Plain(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.up, self.down, self.head = norm(nn.Linear(6, 11)), norm(nn.Linear(11, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(self.up(x).relu()).relu())
        return out


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("backend", ["module", "graph"])
def test_spectral_norms_freeze_nothing(norm: Norm, backend: str) -> None:
    torch.manual_seed(0)
    model, x = Plain(norm).eval(), torch.randn(2, 7, 6)
    program = sir.trace(model, x)
    assert [(g.kind, g.size) for g in sir.groups(program) if g.prunable] == [("ffn", 11), ("ffn", 5)]
    plan = sir.plan(program, ratio=0.2)
    small = sir.shear(model, plan, backend=backend, inputs=x)  # type: ignore[arg-type]  # a Literal
    sir.verify(model, small, plan, x).raise_if_unsound()


def test_what_the_norm_runs_over_can_go() -> None:
    expect(
        typed(lambda v, g: torch._weight_norm(v, g, 0), v=(5, 4, 3), g=(5, 1, 1)),
        """
        v [a:5, b:4, c:3]
        g [a:5, 1, 1]
        -> [a:5, b:4, c:3]
        zero: a b c
        """,
    )


def test_a_norm_of_what_is_computed_is_held() -> None:
    expect(
        typed(lambda v, g: torch._weight_norm(v.tanh(), g, 1), v=(5, 4), g=(1, 4)),
        """
        v [a!:5, b!:4]
        g [1, b!:4]
        -> [a!:5, b!:4]
        zero: a b
        a b: a norm whose tensors are computed, or used elsewhere, runs over the axis at %_weight_norm_default = aten._weight_norm
        """,
    )


def test_a_gain_that_is_read_elsewhere_cannot_follow() -> None:
    expect(
        typed(lambda v, g: (torch._weight_norm(v, g, 0), g.relu()), v=(5, 4), g=(5, 1)),
        """
        v [a!:5, b!:4]
        g [a!:5, 1]
        -> [a!:5, b!:4]
        -> [a!:5, 1]
        zero: a b, a
        a b: a norm whose tensors are computed, or used elsewhere, runs over the axis at %_weight_norm_default = aten._weight_norm
        """,
    )


def test_units_that_training_masks_are_zero_and_no_quotient_of_zeros() -> None:
    model = vocoder("rows")
    groups = sir.groups(sir.trace(model, SOUND))
    first = groups.by_name["c0"]
    units = Units(model, [first])
    gone = torch.zeros(first.size, dtype=torch.bool)
    gone[[2, 5]] = True
    before = model(SOUND)
    with units.masked(gone):
        assert torch.equal(model.first(SOUND)[:, [2, 5]], torch.zeros(2, 2, 17))
        assert bool(model(SOUND).isfinite().all())
    assert torch.equal(model(SOUND), before)
