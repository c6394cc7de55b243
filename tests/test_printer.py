"""The text form: what a program and its axes look like."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shear_ir.frontend.export import trace
from shear_ir.manager import AnalysisManager
from shear_passes.analysis.dump import Dump
from tests.golden import expect, expect_file


def dumped(model: nn.Module) -> str:
    return AnalysisManager(trace(model)).get(Dump())


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6, bias=False)
        self.up = nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_program_prints_with_plain_sizes() -> None:
    expect(
        str(trace(GatedMLP())),
        """
        %x           : f32[3, 7, 4] = input
        @gate.weight : f32[6, 4]    = param
        %gate        : f32[3, 7, 6] = aten.linear(%x, @gate.weight)
        %silu        : f32[3, 7, 6] = aten.silu(%gate)
        @up.weight   : f32[6, 4]    = param
        %up          : f32[3, 7, 6] = aten.linear(%x, @up.weight)
        %mul         : f32[3, 7, 6] = aten.mul(%silu, %up)
        @down.weight : f32[4, 6]    = param
        @down.bias   : f32[4]       = param
        %down        : f32[3, 7, 4] = aten.linear(%mul, @down.weight, @down.bias)
        return %down
        """,
    )


def test_a_gated_mlp_prints_with_its_axes() -> None:
    expect(
        dumped(GatedMLP()),
        """
        %x           : f32[3, 7, a0:4]  = input
        @gate.weight : f32[ffn:6, a0:4] = param
        %gate        : f32[3, 7, ffn:6] = aten.linear(%x, @gate.weight)
        %silu        : f32[3, 7, ffn:6] = aten.silu(%gate)
        @up.weight   : f32[ffn:6, a0:4] = param
        %up          : f32[3, 7, ffn:6] = aten.linear(%x, @up.weight)
        %mul         : f32[3, 7, ffn:6] = aten.mul(%silu, %up)
        @down.weight : f32[a1:4, ffn:6] = param
        @down.bias   : f32[a1:4]        = param
        %down        : f32[3, 7, a1:4]  = aten.linear(%mul, @down.weight, @down.bias)
        return %down

        ffn  mlp channels  6 units  3 tensors  72 parameters  prunable
        a0   other         4 units  2 tensors  48 parameters  frozen: dim 2 of the input x
        a1   other         4 units  2 tensors  28 parameters  frozen: dim 2 of an output of the model
        """,
    )


def test_a_llama_with_shared_kv_heads_prints_its_rotary_pairs() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=18, intermediate_size=34, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    expect_file(dumped(LlamaForCausalLM(config)), "llama_gqa.txt")


def test_gpt2_prints_its_fused_qkv_and_its_tied_embedding() -> None:
    config = GPT2Config(vocab_size=61, n_positions=29, n_embd=24, n_layer=1, n_head=3, n_inner=40)
    expect_file(dumped(GPT2LMHeadModel(config)), "gpt2.txt")


class ConvBlock(nn.Module):
    """A depthwise convolution between two that mix channels, with the input added again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 10, 1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.each = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.back = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(torch.relu(self.each(self.norm(self.mix(x)))))
        return self.head(x.mean((2, 3)))


def test_a_convolutional_block_prints_its_channels() -> None:
    expect_file(dumped(ConvBlock()), "conv_block.txt")


@torch.library.custom_op("shear_tests::scramble", mutates_args=())
def scramble(x: Tensor) -> Tensor:
    """An operator that no rule will ever know."""
    return x.flip(-1)


@scramble.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Scrambled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(scramble(self.up(x)))


def test_a_barrier_says_why_it_is_one() -> None:
    expect(
        dumped(Scrambled()),
        """
        %x           : f32[3, 7, a1:4] = input
        @up.weight   : f32[a0:6, a1:4] = param
        @up.bias     : f32[a0:6]       = param
        %up          : f32[3, 7, a0:6] = aten.linear(%x, @up.weight, @up.bias)
        %scramble    : f32[3, 7, a3:6] = shear_tests.scramble(%up)  # barrier: no axis rule for shear_tests.scramble
        @down.weight : f32[a2:4, a3:6] = param
        @down.bias   : f32[a2:4]       = param
        %down        : f32[3, 7, a2:4] = aten.linear(%scramble, @down.weight, @down.bias)
        return %down

        a0  other  6 units  2 tensors  30 parameters  frozen: no axis rule for shear_tests.scramble at %scramble
        a1  other  4 units   1 tensor  24 parameters  frozen: dim 2 of the input x
        a2  other  4 units  2 tensors  28 parameters  frozen: dim 2 of an output of the model
        a3  other  6 units   1 tensor  24 parameters  frozen: no axis rule for shear_tests.scramble at %scramble
        """,
    )


class Twice(nn.Module):
    """One module called twice, a tied weight, an operator with two results and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.unread = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.two(self.one(self.one(x))).split((1, 3), dim=-1)
        return left + 0.5, right


def test_every_value_has_a_name_of_its_own() -> None:
    expect(
        str(trace(Twice())),
        """
        @unread           : f32[5]                       = param
        %x                : f32[3, 7, 4]                 = input
        @one.weight       : f32[4, 4]                    = param  # also two.weight
        %one              : f32[3, 7, 4]                 = aten.linear(%x, @one.weight)
        %one_1            : f32[3, 7, 4]                 = aten.linear(%one, @one.weight)
        %two              : f32[3, 7, 4]                 = aten.linear(%one_1, @one.weight)
        %split_with_sizes : (f32[3, 7, 1], f32[3, 7, 3]) = aten.split_with_sizes(%two, [1, 3], -1)
        %getitem          : f32[3, 7, 1]                 = %split_with_sizes[0]
        %getitem_1        : f32[3, 7, 3]                 = %split_with_sizes[1]
        %add              : f32[3, 7, 1]                 = aten.add(%getitem, 0.5)
        return %add, %getitem_1
        """,
    )


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).view(x.shape[0] * x.shape[1], 2, 3)


def test_sizes_that_stay_symbolic_are_values_too() -> None:
    expect(
        str(trace(Folded(), dynamic=True)),
        """
        %x          : f32[3, 7, 4]  = input
        %sym_size   : size          = aten.sym_size(%x, 0)
        %sym_size_1 : size          = aten.sym_size(%x, 1)
        @one.weight : f32[6, 4]     = param
        @one.bias   : f32[6]        = param
        %one        : f32[3, 7, 6]  = aten.linear(%x, @one.weight, @one.bias)
        %mul        : size          = mul(%sym_size, %sym_size_1)
        %view       : f32[21, 2, 3] = aten.view(%one, [%mul, 2, 3])
        return %view
        """,
    )
