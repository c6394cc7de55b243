"""Attention: heads and head_dim are shared, positions are held, grouped queries fall out of the shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_attention_shares_heads_and_sums_over_head_dim_and_positions() -> None:
    expect(
        typed(F.scaled_dot_product_attention, query=(2, 3, 5, 4), key=(2, 3, 7, 4), value=(2, 3, 7, 6)),
        """
        query [a:2, b:3, c:5, d:4]
        key   [a:2, b:3, e!:7, d:4]
        value [a:2, b:3, e!:7, f:6]
        ->    [a:2, b:3, c:5, f:6]
        zero: a b f
        e: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_attention_with_a_mask_per_head() -> None:
    expect(
        typed(
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
            q=(2, 3, 5, 4),
            k=(2, 3, 7, 4),
            v=(2, 3, 7, 6),
            m=(3, 5, 7),
        ),
        """
        q [a:2, b:3, c:5, d:4]
        k [a:2, b:3, e!:7, d:4]
        v [a:2, b:3, e!:7, f:6]
        m [b:3, c:5, e!:7]
        -> [a:2, b:3, c:5, f:6]
        zero: a b f
        e: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_attention_with_grouped_queries() -> None:
    """A query head of a removed kv head is zero; one of a removed group is a mean of values, and not zero."""
    expect(
        typed(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            q=(2, 15, 5, 4),
            k=(2, 3, 7, 4),
            v=(2, 3, 7, 6),
        ),
        """
        q [a:2, b:3 * c:5, d:5, e:4]
        k [a:2, b:3, f!:7, e:4]
        v [a:2, b:3, f!:7, g:6]
        -> [a:2, b:3 * c:5, d:5, g:6]
        zero: a b g
        f: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_causal_attention_without_a_batch() -> None:
    expect(
        typed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q=(5, 4), k=(5, 4), v=(5, 6)),
        """
        q [a!:5, b:4]
        k [c!:5, b:4]
        v [c!:5, d:6]
        -> [a!:5, d:6]
        zero: d
        a: positions are compared by number at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        c: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_attention_by_hand_is_the_same() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.softmax(-1) @ v

    expect(
        typed(attention, q=(2, 3, 5, 4), k=(2, 3, 7, 4), v=(2, 3, 7, 6)),
        """
        q [a:2, b:3, c:5, d:4]
        k [a:2, b:3, e!:7, d:4]
        v [a:2, b:3, e!:7, f:6]
        -> [a:2, b:3, c:5, f:6]
        zero: a b f
        e: softmax runs over the axis at %softmax_int = aten.softmax.int
        """,
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed, out)


def test_fused_qkv_laid_part_by_part() -> None:
    """GPT-2: all of q, then all of k, then all of v."""

    def block(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv).split(12, -1)
        return attend(split_heads(q, 3), split_heads(k, 3), split_heads(v, 3), out)

    expect(
        typed(block, x=(2, 5, 8), qkv=(36, 8), out=(8, 12)),
        """
        x   [a:2, b!:5, c:8]
        qkv [(d:3 * e:4 | d:3 * e:4 | d:3 * f:4), c:8]
        out [g:8, d:3 * f:4]
        ->  [a:2, b!:5, g:8]
        zero: a g
        b: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_fused_qkv_laid_head_by_head() -> None:
    """GPT-NeoX: q, k and v of the first head, then of the second."""

    def block(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv).view(2, 5, 3, 12).transpose(1, 2).chunk(3, -1)
        return attend(q, k, v, out)

    expect(
        typed(block, x=(2, 5, 8), qkv=(36, 8), out=(8, 12)),
        """
        x   [a:2, b!:5, c:8]
        qkv [d:3 * (e:4 | e:4 | f:4), c:8]
        out [g:8, d:3 * f:4]
        ->  [a:2, b!:5, g:8]
        zero: a g
        b: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_fused_qkv_counted_by_a_dim_of_three() -> None:
    """BLOOM and ModernBERT: one dim tells q, k and v apart, so all three have the same head_dim."""

    def block(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv).view(2, 5, 3, 3, 4).unbind(-2)
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out)

    expect(
        typed(block, x=(2, 5, 8), qkv=(36, 8), out=(8, 12)),
        """
        x   [a:2, b!:5, c:8]
        qkv [d:3 * (1 | 1 | 1) * e:4, c:8]
        out [f:8, d:3 * e:4]
        ->  [a:2, b!:5, f:8]
        zero: a f
        b: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_fused_qkv_with_grouped_queries() -> None:
    """Phi-3: three query heads for each of two kv heads."""

    def block(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        fused = F.linear(x, qkv)
        q, k, v = fused[..., :24], fused[..., 24:32], fused[..., 32:]
        k, v = (split_heads(t, 2).repeat_interleave(3, dim=1) for t in (k, v))
        return attend(split_heads(q, 6), k, v, out)

    expect(
        typed(block, x=(2, 5, 9), qkv=(40, 9), out=(9, 24)),
        """
        x   [a:2, b!:5, c:9]
        qkv [(d:2 * e:3 * f:4 | d:2 * f:4 | d:2 * g:4), c:9]
        out [h:9, d:2 * e:3 * g:4]
        ->  [a:2, b!:5, h:9]
        zero: a h
        b: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_one_kv_head_for_all_queries() -> None:
    """Multi-query attention: the one kv head is no axis, the query heads are."""

    def block(x: Tensor, q: Tensor, kv: Tensor, out: Tensor) -> Tensor:
        k, v = F.linear(x, kv)[:, None].chunk(2, -1)
        return attend(split_heads(F.linear(x, q), 3), k, v, out)

    expect(
        typed(block, x=(2, 5, 8), q=(12, 8), kv=(8, 8), out=(8, 12)),
        """
        x   [a:2, b!:5, c:8]
        q   [d:3 * e:4, c:8]
        kv  [(e:4 | f:4), c:8]
        out [g:8, d:3 * f:4]
        ->  [a:2, b!:5, g:8]
        zero: a g
        b: softmax runs over the keys' positions at %scaled_dot_product_attention_default = aten.scaled_dot_product_attention
        """,
    )


def test_a_norm_of_every_head_holds_head_dim_alone() -> None:
    """Qwen3: RMS normalisation of q and k."""

    def block(x: Tensor, q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        a, b = (split_heads(F.linear(x, w), 3) for w in (q, k))
        a = scale * a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6)
        return a @ b.transpose(-1, -2)

    expect(
        typed(block, x=(2, 5, 8), q=(12, 8), k=(12, 8), scale=(4,)),
        """
        x     [a:2, b:5, c:8]
        q     [d:3 * e~:4, c:8]
        k     [d:3 * e~:4, c:8]
        scale [e~:4]
        ->    [a:2, d:3, b:5, b:5]
        zero: a d
        e: a mean (RMS normalisation) runs over the axis at %mean_dim = aten.mean.dim
        """,
    )
