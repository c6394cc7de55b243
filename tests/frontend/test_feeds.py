"""One owner of inputs: any nesting of tensors, under the names of forward, kept with what was traced with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.frontend.feeds import inputs_of
from shear_tools.api.pipeline import _program
from tests.roads import outputs, same

BACKENDS: list[Literal["module", "graph"]] = ["module", "graph"]


def sheared(model: nn.Module, backend: Literal["module", "graph"], inputs: Any, fresh: Any) -> nn.Module:
    """``model`` less a third of its ``wide`` units; right on what it was traced with and on ``fresh`` inputs."""
    program = sir.trace(model, inputs)
    plan = sir.plan(program, ratio=0.3, kinds=tuple({g.kind for g in sir.groups(program) if g.prunable}))
    small = sir.shear(model, plan, backend=backend)
    sir.verify(model, small, plan, [inputs, fresh]).raise_if_unsound()
    sir.verify(model, small, plan).raise_if_unsound()
    return small


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["input", "id", "type", "iter", "slice", "device", "getattr", "inf", "x_1"])
def test_an_argument_may_be_called_as_something_of_python_is(name: str, backend: Literal["module", "graph"]) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {name}): return self.narrow(self.wide({name})[:, :11].relu())", scope)
    kind = type("Named", (nn.Module,), {"forward": scope["forward"]})
    model = kind().eval()
    model.wide, model.narrow = nn.Linear(6, 11), nn.Linear(11, 3)
    program = sir.trace(model, torch.randn(2, 6))
    assert program.inputs == (name,)
    sheared(model, backend, {name: torch.randn(2, 6)}, {name: torch.randn(5, 6)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bare_sequential_is_sheared(backend: Literal["module", "graph"]) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    small = sheared(model, backend, torch.randn(2, 6), torch.randn(7, 6))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


class Two(nn.Module):
    """Adds two feature maps up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.narrow = nn.Linear(5, 13), nn.Linear(6, 13), nn.Linear(13, 3)

    def out(self, a: Tensor, b: Tensor) -> Tensor:
        return self.narrow((self.one(a) + self.two(b)).relu())  # type: ignore[no-any-return]


class OfList(Two):
    def forward(self, feats: list[Tensor]) -> Tensor:
        return self.out(feats[0], feats[1])


class OfDict(Two):
    def forward(self, scale: float, feats: dict[str, Any]) -> Tensor:
        return scale * self.out(feats["low"], feats["high"][0])


class OfMany(Two):
    def forward(self, *feats: Tensor) -> Tensor:
        return self.out(*feats)


class OfPlaces(Two):
    def forward(self, a: Tensor, b: Tensor, /) -> Tensor:
        return self.out(a, b)


def pair(rows: int) -> list[Tensor]:
    return [torch.randn(rows, 5), torch.randn(rows, 6)]


def nested(rows: int) -> dict[str, Any]:
    low, high = pair(rows)
    return {"feats": {"low": low, "high": (high,)}, "scale": 0.5}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model", "inputs", "fresh", "names"),
    [
        (OfList(), {"feats": pair(2)}, {"feats": pair(7)}, ("feats_0", "feats_1")),
        (OfDict(), nested(2), nested(7), ("feats_low", "feats_high_0")),
        (OfMany(), tuple(pair(2)), tuple(pair(7)), ("feats_0", "feats_1")),
        (OfPlaces(), tuple(pair(2)), tuple(pair(7)), ("a", "b")),
    ],
)
def test_inputs_are_any_nesting_of_tensors(
    model: nn.Module, inputs: Any, fresh: Any, names: tuple[str, ...], backend: Literal["module", "graph"]
) -> None:
    model.eval()
    small = sheared(model, backend, inputs, fresh)
    assert sir.trace(model, inputs).inputs == names
    assert small(**inputs)[0].shape[-1] == 3 if isinstance(inputs, dict) else small(*inputs)[0].shape[-1] == 3


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (OfList(), [{"feats": pair(4)}, {"feats": pair(3)}]),
        (OfList(), [pair(4), pair(3)]),
        (OfDict(), [{**nested(4), "name": "first"}, {**nested(3), "name": "second"}]),
        (OfMany(), [tuple(pair(4)), tuple(pair(3))]),
        (OfPlaces(), [tuple(pair(4)), tuple(pair(3))]),
    ],
)
def test_criteria_read_batches_of_any_nesting(model: nn.Module, batches: list[Any]) -> None:
    """What goes into ``narrow``, by hand."""
    given = [b if not isinstance(b, dict) else {n: v for n, v in b.items() if n != "name"} for b in batches]
    program = sir.trace(model.eval(), given[0])
    read: list[Tensor] = []
    handle = model.narrow.register_forward_pre_hook(lambda _, args: read.append(args[0].double()))  # type: ignore[union-attr]
    for each in given:
        with torch.no_grad():
            model(**each) if isinstance(each, dict) else model(*(each if not isinstance(model, OfList) else [each]))
    handle.remove()
    x, weight = torch.cat(read), model.narrow.weight.double()  # type: ignore[union-attr,operator]
    expected = (x.var(0, correction=0) * weight.square().sum(0)).detach()
    (found,) = sir.scores(program, "flap", data=batches)["flap"].values()
    assert torch.allclose(torch.as_tensor(found).double(), expected, rtol=1e-5)
    taylor = sir.scores(program, "taylor", data=batches, loss=lambda out, _: out.square().mean())["taylor"]
    assert all(bool(torch.as_tensor(each).isfinite().all()) for each in taylor.values())


def test_arguments_given_by_name_stand_in_the_order_of_the_signature() -> None:
    class Difference(Two):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.narrow((self.one(a) - self.two(b)).relu())  # type: ignore[no-any-return]

    model, (a, b) = Difference().eval(), pair(2)
    plan = sir.plan(sir.trace(model, {"b": b, "a": a}), ratio=0.3)
    graph = sir.shear(model, plan, backend="graph")
    assert torch.equal(graph(a, b)[0], graph(b=b, a=a)[0])


def test_an_argument_that_forward_does_not_have_is_named() -> None:
    with pytest.raises(sir.TraceError, match=r"OfList.forward has no argument features; it has feats"):
        sir.trace(OfList(), {"features": pair(2)})


def test_a_program_is_found_again_by_its_inputs() -> None:
    model = OfList().eval()
    short = sir.trace(model, {"feats": pair(2)})
    longer = sir.trace(model, {"feats": pair(7)})
    assert _program(model, {"feats": pair(2)}) is short
    assert _program(model, None) is longer
    assert [t.shape[0] for t in inputs_of(model)["feats"]] == [7, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shear_uses_the_inputs_of_the_trace(backend: Literal["module", "graph"]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=53, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    feed = {"input_ids": torch.randint(0, 53, (2, 8))}
    program = sir.trace(model, feed)
    plan = sir.plan(program, ratio=0.2)
    small = sir.shear(model, plan, backend=backend)
    assert inputs_of(small)["input_ids"].equal(feed["input_ids"])
    sir.verify(model, small, plan, feed).raise_if_unsound()


class Numbered(nn.Module):
    """Takes the first positions, as many as a number says."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.window = nn.Linear(5, 13), nn.Linear(13, 3), 4

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x[:, : self.window]).relu())  # type: ignore[no-any-return]


def test_a_program_is_traced_anew_when_a_number_of_a_module_changed() -> None:
    model, x = Numbered().eval(), torch.randn(2, 7, 5)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    model.window = 6
    graph = sir.shear(model, plan, backend="graph")
    assert graph(x)[0].shape == (2, 6, 3)
    small = sir.shear(model, plan)
    assert same(outputs(small, {"x": x}), tuple(graph(x))) or torch.allclose(small(x), graph(x)[0], atol=1e-6)


class Table(nn.Module):
    """Adds a table that the trace lifts out of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(5, 13), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.tensor([0.25, -1.5, 2.0], device=x.device).to(x.dtype)
        return self.narrow(self.wide(x).relu()) + table  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_moved_to_another_precision_after_its_trace_is_sheared_as_it_is(
    backend: Literal["module", "graph"],
) -> None:
    model, x = Table().eval(), torch.randn(2, 7, 5)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    model.to(torch.bfloat16)
    small = sir.shear(model, plan, backend=backend)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    expected = torch.nn.functional.linear(
        torch.relu(model.wide(x.bfloat16()))[..., plan.kept["wide.weight"][0].tolist()],
        model.narrow.weight[:, plan.kept["wide.weight"][0].tolist()],
        model.narrow.bias,
    ) + torch.tensor([0.25, -1.5, 2.0], dtype=torch.bfloat16)
    made = small(x.bfloat16())
    torch.testing.assert_close(made[0] if isinstance(made, tuple) else made, expected)


def test_a_model_that_moved_to_another_device_after_its_trace_is_sheared_there() -> None:
    model, x = Table().eval(), torch.randn(2, 7, 5)
    plan = sir.plan(sir.trace(model, x), ratio=0.3)
    model.to("meta")
    small = sir.shear(model, plan, backend="graph")
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"meta"}


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=53, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=22, max_source_positions=17,
        max_target_positions=29, num_mel_bins=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def test_a_length_that_the_config_fixes_is_made_from_it(tmp_path: Path) -> None:
    model = whisper()
    assert inputs_of(model)["input_features"].shape[1:] == (5, 2 * 17)
    program = sir.trace(model)
    plan = sir.plan(program, ratio=0.1, importance="order", kinds=("ffn",))
    small = sir.shear(model, plan)
    assert sir.save(small, tmp_path / "out").stock
    again = sir.load(tmp_path / "out")
    assert same(outputs(again, inputs_of(model)), outputs(small, inputs_of(model)))
