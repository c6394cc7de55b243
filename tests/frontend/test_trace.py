"""A trace that fails says so once; what is traced runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.frontend.export import output_tensors


class Mismatched(nn.Module):
    """Multiplies matrices that do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 10)
        self.narrow = nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x))


def test_a_failed_trace_names_the_module_and_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    with pytest.raises(sir.TraceError, match=r"Mismatched cannot be traced: in module narrow \(Linear\)"):
        sir.trace(Mismatched(), torch.randn(3, 12))
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before


class Mapped(nn.Module):
    """Masks by a function of two positions that ``vmap`` lays out, and which no other part knows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 11)
        self.narrow = nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        rows = torch.vmap(lambda i, j: i >= j, in_dims=(None, 0))
        mask = torch.vmap(rows, in_dims=(0, None))(places, places)
        return self.narrow(mask.float() @ self.wide(x))


@pytest.mark.parametrize("backend", ["graph", "module"])
def test_a_mapped_function_is_traced_with_the_dims_it_has(backend: Literal["graph", "module"]) -> None:
    model, x = Mapped(), torch.randn(4, 7, 3)
    program = sir.trace(model, x)
    assert not sir.groups(program).axes.barriers
    plan = sir.plan(program, ratio=0.3, kinds=("head_dim",))
    assert plan.kept["wide.weight"][0].size < 11
    small = sir.shear(model, plan, inputs=x, backend=backend)
    sir.verify(model, small, plan, [{"x": x}, {"x": torch.randn(5, 9, 3)}]).raise_if_unsound()


@pytest.mark.parametrize("parameter", [False, True])
def test_what_is_written_to_beside_a_mapped_function_is_no_output(parameter: bool) -> None:
    class Counting(Mapped):
        def __init__(self) -> None:
            super().__init__()
            if parameter:
                self.seen = nn.Parameter(torch.zeros(3), requires_grad=False)
            else:
                self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x.mean((0, 1)))
            return super().forward(x)

    with pytest.raises(sir.TraceError, match="beside a vmap, seen is written to in place"):
        sir.trace(Counting(), torch.randn(4, 7, 3))


class Chain(nn.Module):
    """Up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 13), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x).relu())


def distributed(model: nn.Module) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, distributed])
@pytest.mark.parametrize("backend", ["graph", "module"])
def test_what_wraps_a_model_is_taken_off(wrap: Callable[[nn.Module], Any], backend: Literal["graph", "module"]) -> None:
    model, x = Chain().eval(), torch.randn(2, 5)
    wrapped = wrap(model)
    plan = sir.plan(sir.trace(wrapped, x), ratio=0.3)
    assert set(plan.kept) == {"up.weight", "up.bias", "down.weight"}
    small = sir.shear(wrapped, plan, backend=backend)
    assert isinstance(small, torch.fx.GraphModule if backend == "graph" else Chain)
    sir.verify(wrapped, small, plan).raise_if_unsound()


class Penalised(Chain):
    """Another output beside the logits, which is a softmax over the hidden channels."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return {
            "logits": self.down(hidden.relu()),
            "penalty": hidden.softmax(-1).square().mean(),
            "hidden_states": (hidden,),
            "past_key_values": hidden,
            "choice": self.down(hidden.relu()).argmax(-1),
        }


def test_outputs_beside_logits_count_but_for_caches_and_listed_states() -> None:
    model, x = Penalised().eval(), torch.randn(2, 5)
    found = output_tensors(model(x))
    assert [tuple(t.shape) for t in found] == [(2, 3), (), (2,)]
    assert torch.equal(found[1], model(x)["penalty"])
    assert torch.equal(found[2], model(x)["choice"])
    groups = sir.groups(sir.trace(model, x))
    (hidden,) = [g for g in groups if g.size == 13]
    assert not hidden.prunable
    assert "softmax" in hidden.reason


class Choosing(Chain):
    """Says beside the logits which hidden channel is the largest."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return {"logits": self.down(hidden.relu()), "which": hidden.argmax(-1)}


def test_channels_that_an_output_beside_logits_numbers_stay() -> None:
    (hidden,) = [g for g in sir.groups(sir.trace(Choosing().eval(), torch.randn(2, 5))) if g.size == 13]
    assert hidden.reason == "named by the numbers of an output of the model"


def test_states_of_an_encoder_are_no_output() -> None:
    (logits,) = output_tensors({"logits": torch.randn(2, 3), "encoder_last_hidden_state": torch.randn(2, 5)})
    assert logits.shape == (2, 3)


def test_rotary_frequencies_that_follow_the_length_are_a_call_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    plan = sir.plan(sir.trace(model), ratio=0.1, importance="order")
    assert capfd.readouterr() == ("", "")
    assert {cut.kind for cut in plan.cuts} == {"ffn"}
    small = sir.shear(model, plan)
    sir.verify(model, small, plan).raise_if_unsound()


class Deciding(nn.Module):
    """Branches on what it computes, at the root, where there is nothing left to prune without it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 13)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        return hidden * 2 if hidden.sum() > 0 else hidden


def test_a_forward_that_branches_on_data_is_refused_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(sir.TraceError, match="Deciding cannot be traced") as failure:
        sir.trace(Deciding(), torch.randn(2, 5))
    assert "\n" not in str(failure.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("given", [None, "tiny", 3, transformers.LlamaForCausalLM])
def test_what_is_no_module_is_told_so(given: Any) -> None:
    what = "the class LlamaForCausalLM" if isinstance(given, type) else f"a {type(given).__name__}"
    for call in (sir.trace, sir.with_rms_norms, lambda model: sir.verify(Chain(), model, None)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"a model is a torch.nn.Module, not {what}"):
            call(given)


def test_sounds_are_made_for_what_reads_samples() -> None:
    config = transformers.Wav2Vec2Config(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        conv_dim=(12, 12), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config).eval()
    plan = sir.plan(sir.trace(model), ratio=0.1)
    sir.verify(model, sir.shear(model, plan), plan).raise_if_unsound()
