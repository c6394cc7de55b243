"""A clean room: after every public call a model is what it was, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import shear_ir as sir
from shear_ir.plans import Plan
from tests.roads import outputs, same


class Restless(nn.Module):
    """Writes to everything that it has when it runs, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 13), nn.Linear(13, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("moved", torch.zeros(3))
        self.steps = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.calls, self.last, self.tables = 0, torch.zeros(2), {"first": torch.ones(4)}
        self.history: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        self.calls += 1
        self.steps.add_(1.0)
        self.moved.add_(x.mean())
        self.mean = 0.5 * self.mean + x.detach().mean(0)
        self.last = hidden
        self.tables["first"] = self.tables["first"] * 2
        self.tables["second"] = hidden.sum(0)
        self.history.append(hidden)
        return self.down(hidden)  # type: ignore[no-any-return]


def restless() -> tuple[nn.Module, Any]:
    model = Restless()
    model.up.eval()
    return model, torch.randn(2, 5)


def longrope() -> tuple[nn.Module, Any]:
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    config = Phi3Config(
        vocab_size=53, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=64, original_max_position_embeddings=32, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, rope_parameters={**rope, "original_max_position_embeddings": 32},
    )  # fmt: skip
    return Phi3ForCausalLM(config), {"input_ids": torch.randint(3, 53, (2, 7))}


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a model is: objects by identity, and their values."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}:{name}"] = _value(value)
    config = getattr(model, "config", None)
    return {**found, "config": copy.deepcopy(config.to_dict()) if config is not None else None}


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.requires_grad, value.detach().clone().flatten().tolist()
    if isinstance(value, dict):
        return {key: _value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(each) for each in value]
    return value


_CALLS: dict[str, Callable[[nn.Module, Any, Plan, Path], Any]] = {
    "trace": lambda model, inputs, plan, out: sir.trace(model, inputs),
    "trace dynamic": lambda model, inputs, plan, out: sir.trace(model, inputs, dynamic=True),
    "groups": lambda model, inputs, plan, out: sir.groups(sir.trace(model, inputs)),
    "explain": lambda model, inputs, plan, out: sir.explain(sir.trace(model, inputs), next(iter(plan.kept))),
    "plan": lambda model, inputs, plan, out: sir.plan(sir.trace(model, inputs), ratio=0.1),
    "scores": lambda model, inputs, plan, out: sir.scores(sir.trace(model, inputs), "wanda", data=[inputs]),
    "shear": lambda model, inputs, plan, out: sir.shear(model, plan),
    "shear graph": lambda model, inputs, plan, out: sir.shear(model, plan, backend="graph"),
    "verify": lambda model, inputs, plan, out: sir.verify(model, sir.shear(model, plan), plan),
    "save": lambda model, inputs, plan, out: sir.save(sir.shear(model, plan), out),
    "repair": lambda model, inputs, plan, out: sir.repair(model, plan, data=[inputs]),
}


@pytest.mark.parametrize("made", [restless, pytest.param(longrope, marks=pytest.mark.thorough)])
def test_a_model_is_what_it_was_after_every_public_call(
    made: Callable[[], tuple[nn.Module, Any]], tmp_path: Path
) -> None:
    model, inputs = made()
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    before = everything(model)
    plan = sir.plan(sir.trace(model, inputs), ratio=0.1)
    for name, call in _CALLS.items():
        call(model, inputs, plan, tmp_path / name)
        assert everything(model) == before, name


def test_saving_leaves_the_sheared_model_as_it_was(tmp_path: Path) -> None:
    model, inputs = restless()
    small = sir.shear(model, sir.plan(sir.trace(model, inputs), ratio=0.2))
    before = everything(small)
    sir.save(small, tmp_path / "out")
    assert everything(small) == before


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 13)), nn.ReLU(), nn.Linear(13, 3))  # type: ignore[no-untyped-call]


def masked_by_torch() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 13), nn.ReLU(), nn.Linear(13, 3))
    prune.l1_unstructured(model[0], "weight", 0.3)  # type: ignore[no-untyped-call]
    return model


class Keeping(nn.Module):
    """Keeps an activation where others can look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 13), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.up(x)
        return self.down(self.last.relu())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("made", [old_weight_norm, masked_by_torch, Keeping])
@pytest.mark.parametrize("backend", ["module", "graph"])
def test_a_model_that_holds_results_of_a_forward_pass_is_sheared(made: Callable[[], nn.Module], backend: Any) -> None:
    model, x = made().eval(), torch.randn(2, 5)
    model(x)
    program = sir.trace(model, x)
    kinds = tuple({g.kind for g in sir.groups(program) if g.prunable})
    if not kinds:
        pytest.skip("nothing can go")
    plan = sir.plan(program, ratio=0.3, kinds=kinds)
    small = sir.shear(model, plan, backend=backend)
    sir.verify(model, small, plan, [{program.inputs[0]: torch.randn(7, 5)}]).raise_if_unsound()


def test_two_runs_of_a_buffer_that_moves_start_where_the_model_stands() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 13), nn.Linear(13, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.down(self.up(x).relu()) + self.count  # type: ignore[no-any-return]

    model, x = Moving().eval(), torch.randn(2, 5)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    graph, small = sir.shear(model, plan, backend="graph"), sir.shear(model, plan)
    assert float(model.count) == 0.0  # type: ignore[arg-type]
    assert same(outputs(small, {"x": x}), tuple(graph(x)))
    assert float(model.count) == 0.0  # type: ignore[arg-type]


class Collecting(nn.Module):
    """A hook keeps what it saw with the model it was registered on, also when a copy runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.seen: list[Tensor] = []
        self.up.register_forward_hook(lambda module, given, made: self.seen.append(made))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.up(x).relu())
        return made


def test_a_hook_that_collects_activations_is_no_obstacle_and_leaves_none() -> None:
    model, feed = Collecting().eval(), {"x": torch.randn(2, 7, 8)}
    program = sir.trace(model, feed)
    plan = sir.plan(program, ratio=0.3)
    small = sir.shear(model, plan, inputs=feed)
    assert sir.verify(model, small, plan, inputs=feed).sound
    assert model.seen == []
