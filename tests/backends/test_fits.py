"""Sizes that forward takes from the width of its input: heads leave all the same, and what stays saves and cuts again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import shear_ir as sir
from shear_backends.module.fits import Fit, install_fits
from shear_ir.errors import ShearingError
from tests.roads import outputs, same, trace
from tests.zoo import randomised


class WideAttention(nn.Module):
    """Attention whose heads together are as wide as what it reads: its code knows no other width."""

    def __init__(self, hidden: int = 24, heads: int = 6) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.o(mixed.reshape(batch, length, width))  # type: ignore[no-any-return]


class WideGate(nn.Module):
    """Two halves and a scale laid end to end, split by the width of the input."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(hidden, 2 * hidden + 3), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, b, scale = torch.split(self.into(x), (x.shape[-1], x.shape[-1], 3), dim=-1)
        return self.out(a * b.tanh()) + x * scale.sum(-1, keepdim=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("model", "kind"), [(WideAttention(), "kv_head"), (WideGate(), "ffn")])
def test_what_is_as_wide_as_the_input_gets_narrower(model: nn.Module, kind: str) -> None:
    family = trace(randomised(model))
    (group,) = family.able(kind)
    plan = family.without({group: [0, 3]})
    small = sir.shear(family.model, plan)
    width = next(p for p in model.parameters()).shape[-1]
    report = sir.verify(family.model, small, plan, [{"x": torch.randn(2, n, width)} for n in (7, width, 17)])
    assert report.sound
    assert report.moved > 0.01
    assert same(outputs(small, family.feed), outputs(copy.deepcopy(small), family.feed))


def test_a_narrower_one_is_saved_loaded_and_pruned_again(tmp_path: Path) -> None:
    family = trace(randomised(WideAttention()))
    (group,) = family.able("kv_head")
    once = sir.shear(family.model, family.without({group: [0, 3]}))
    assert once.shear_record.fits == (Fit("", 3, (2,), (24,), (16,), (-1, -1, 4, 4)),)
    sir.save(once, tmp_path / "out")
    again = sir.load(tmp_path / "out", WideAttention())
    assert same(outputs(once, family.feed), outputs(again, family.feed))
    second = trace(again)
    (rest,) = second.able("kv_head")
    assert rest.size == 4
    twice = sir.shear(again, second.without({rest: [1]}))
    assert sir.verify(family.model, twice, twice.shear_record.plan, family.feed).sound
    assert same(outputs(twice, family.feed), outputs(copy.deepcopy(twice), family.feed))


def test_a_narrower_one_is_traced_for_inputs_of_any_size() -> None:
    family = trace(randomised(WideAttention()))
    (group,) = family.able("kv_head")
    small = sir.shear(family.model, family.without({group: [0, 3]}))
    program = sir.trace(small, family.feed, dynamic=True)
    plan = sir.plan(program, ratio=0.2, kinds=("kv_head",), importance="magnitude")
    graph = sir.shear(small, plan, backend="graph", inputs=family.feed)
    sir.verify(small, graph, plan, [{"x": torch.randn(b, n, 24)} for b, n in ((2, 7), (3, 9))]).raise_if_unsound()


class Viewing(nn.Module):
    def forward(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return x.view(sizes)


def test_only_a_size_that_cannot_be_had_is_mended() -> None:
    model = Viewing()
    install_fits(model, [Fit("", 2, (1,), (8,), (6,)), Fit("", 2, (1,), (6,), (2,))])
    assert model(torch.zeros(48), (6, 8)).shape == (6, 8)
    assert model(torch.zeros(36), (6, 8)).shape == (6, 6)
    assert model(torch.zeros(12), (6, 8)).shape == (6, 2)
    with pytest.raises(RuntimeError, match="invalid"):
        model(torch.zeros(36), (-1, 8))
    with pytest.raises(RuntimeError, match="invalid"):
        model(torch.zeros(30), (6, 8))


def test_two_answers_are_none() -> None:
    model = Viewing()
    install_fits(model, [Fit("", 2, (0,), (8,), (6,)), Fit("", 2, (1,), (8,), (6,))])
    assert model(torch.zeros(36), (8, 6)).shape == (6, 6)
    with pytest.raises(RuntimeError, match="invalid"):
        model(torch.zeros(48), (8, 8))


class Numbers(nn.Module):
    """Attention whose sizes stand in its code as numbers: 4 heads of 2, laid in one tensor of 24 or in three of 8."""

    def __init__(self, way: str, back: str) -> None:
        super().__init__()
        self.way, self.back = way, back
        self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self.heads(part, batch, length).transpose(1, 2) for part in self.parts(self.qkv(x)))
        mixed = ((q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v).transpose(1, 2)
        flat = mixed.reshape(batch, -1, 8) if self.back == "open" else mixed.reshape(batch, length, 8)
        return self.head(x + self.out(flat))  # type: ignore[no-any-return]

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.way == "chunk":
            return y.chunk(3, dim=-1)
        return torch.split(y, 8, dim=2) if self.way == "split" else y.split([8, 8, 8], -1)

    def heads(self, y: Tensor, batch: int, length: int) -> Tensor:
        if self.way == "chunk":
            return y.view(batch, length, 4, 2)
        return y.unflatten(-1, (4, 2)) if self.way == "split" else y.view(batch, -1, 4, 2)


@pytest.mark.parametrize("way", ["chunk", "split", "list"])
@pytest.mark.parametrize("back", ["open", "numbers"])
@pytest.mark.parametrize("kinds", [("kv_head",), ("head_dim",), ("kv_head", "head_dim")])
def test_sizes_that_stand_in_the_code_as_numbers_follow(way: str, back: str, kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, feed = Numbers(way, back).eval(), torch.randn(2, 7, 6)
    family = trace(model, {"x": feed})
    gone = {group: [0] for kind in kinds for group in family.able(kind)}
    assert {group.size for group in gone} == {4 if kind == "kv_head" else 2 for kind in kinds}
    small = sir.shear(model, plan := family.without(gone), inputs=feed)
    # At 8 and 16 positions a wrong number of heads would divide what there is, too.
    report = sir.verify(model, small, plan, [{"x": torch.randn(b, n, 6)} for b, n in ((2, 7), (3, 8), (1, 16), (4, 3))])
    assert report.sound
    assert report.moved > 1e-3


def test_values_alone_may_get_narrower_in_one_tensor_with_queries_and_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, feed = Numbers("chunk", "open").eval(), {"x": torch.randn(2, 7, 6)}
    family = trace(model, feed)
    values = next(g for g in family.able("head_dim") if "out.weight" in g.parameters)
    once = sir.shear(model, family.without({values: [1]}), inputs=feed)
    assert once.qkv(feed["x"]).shape[-1] == 20  # type: ignore[operator]
    sir.save(once, tmp_path / "out")
    again = sir.load(tmp_path / "out", model)
    assert same(outputs(once, feed), outputs(again, feed))
    second = trace(again, feed)
    (heads,) = second.able("kv_head")
    twice = sir.shear(again, second.without({heads: [2]}), inputs=feed)
    longer = [feed, {"x": torch.randn(3, 8, 6)}]
    assert sir.verify(model, twice, twice.shear_record.plan, longer).sound


def test_a_size_left_open_is_mended_only_in_what_was_cut() -> None:
    model = Viewing()
    install_fits(model, [Fit("", 3, (2,), (8,), (6,), (-1, 6))])
    assert model(torch.zeros(8, 6), (-1, 2, 8)).shape == (4, 2, 6)
    assert model(torch.zeros(4, 8), (-1, 2, 8)).shape == (2, 2, 8)
    with pytest.raises(RuntimeError, match="invalid"):
        model(torch.zeros(3, 6), (-1, 2, 8))


_LLAMA = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("kinds", [("head_dim",), ("rotary_pair",), ("head_dim", "rotary_pair")], ids="+".join)
def test_keys_and_values_of_one_head_dim_get_unlike_widths(kinds: tuple[str, ...], tmp_path: Path) -> None:
    model = randomised(LlamaForCausalLM(LlamaConfig(**_LLAMA)))
    plan = sir.plan(sir.trace(model), ratio=0.08, kinds=kinds, importance="magnitude")
    small = sir.shear(model, plan)
    widths = {
        name: small.get_submodule(f"model.layers.1.self_attn.{name}").out_features for name in ("k_proj", "v_proj")
    }
    assert widths["k_proj"] != widths["v_proj"]
    assert sir.verify(model, small, plan).sound
    ids = torch.randint(3, 97, (2, 9))
    sir.save(small, tmp_path / "out")
    read = sir.load(tmp_path / "out")
    assert torch.equal(read(input_ids=ids).logits, small(input_ids=ids).logits)
    told = [read.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*told)
    again = sir.plan(sir.trace(read), ratio=0.05, kinds=kinds, importance="magnitude")
    assert sir.verify(read, sir.shear(read, again), again).sound


def test_a_width_that_forward_computes_is_refused_by_the_name_of_the_group() -> None:
    config = {**_LLAMA, "hidden_size": 96}
    model = randomised(Phi3ForCausalLM(Phi3Config(**{k: v for k, v in config.items() if k != "head_dim"})))
    plan = sir.plan(sir.trace(model), ratio=0.08, kinds=("rotary_pair",), importance="magnitude")
    with pytest.raises(ShearingError, match=r"without 2 of 8 rotary_pair units of r .*: use the graph backend"):
        sir.shear(model, plan)
