"""Steps of several lines: what models are made of."""

from __future__ import annotations

from tests.oracle.fuzz.draft import Choose, Draft


def attention(draft: Draft, choose: Choose) -> None:
    """Queries of ``kv x g`` heads, keys and values of ``kv``, rotary halves or not, by hand or by one operator."""
    x = draft.pick(lambda v: v.dim() == 3)
    b, t, n = draft.shape(x)
    kv, g, d = choose.one((1, 2, 3)), choose.one((1, 1, 2, 3)), choose.one((2, 4, 6))
    heads = kv * g
    if choose.chance(30) and g == 1:
        fused = draft.emit(f"{draft.module(f'nn.Linear({n}, {3 * heads * d})')}({x})")
        q, k, v = draft.emit_many(choose.one((
            f"{fused}.view({b}, {t}, 3, {heads}, {d}).permute(2, 0, 3, 1, 4)",
            f"{fused}.view({b}, {t}, {heads}, 3 * {d}).transpose(1, 2).chunk(3, -1)",
            f"[z.view({b}, {t}, {heads}, {d}).transpose(1, 2) for z in {fused}.split({heads * d}, -1)]",
        )))  # fmt: skip
    else:
        q, k, v = (_heads(draft, choose, x, count, d) for count in (heads, kv, kv))
    if choose.chance(30):
        q, k = (_rotated(draft, choose, z, t, d) for z in (q, k))
    if choose.chance(20):
        scale = draft.module(f"nn.RMSNorm({d}, eps=1e-5)")
        q, k = draft.emit(f"{scale}({q})"), draft.emit(f"{scale}({k})")
    by_operator = choose.chance(50)
    gqa = by_operator and g > 1 and choose.chance(40)
    if g > 1 and not gqa:
        k, v = (_copied(draft, choose, z, b, kv, g, t, d) for z in (k, v))
    if by_operator:
        options = choose.one(("", ", is_causal=True", f", scale={0.7}"))
        out = draft.emit(f"F.scaled_dot_product_attention({q}, {k}, {v}{options}{', enable_gqa=True' if gqa else ''})")
    else:
        out = _by_hand(draft, choose, q, k, v, t)
    flat = draft.emit(f"{out}.transpose(1, 2).reshape({b}, {t}, {heads * d})")
    if choose.chance(70):
        back = draft.emit(f"{draft.module(f'nn.Linear({heads * d}, {n}, bias=False)')}({flat})")
        draft.emit(f"{x} + {back}" if choose.chance(60) else f"{back} * 1.0")


def _heads(draft: Draft, choose: Choose, x: str, count: int, d: int) -> str:
    b, t, n = draft.shape(x)
    made = draft.emit(f"{draft.module(f'nn.Linear({n}, {count * d}, bias={choose.chance(50)})')}({x})")
    return draft.emit(choose.one((
        f"{made}.view({b}, {t}, {count}, {d}).transpose(1, 2)",
        f"{made}.view({b}, {t}, -1, {d}).permute(0, 2, 1, 3)",
        f"{made}.unflatten(-1, ({count}, {d})).movedim(2, 1)",
    )))  # fmt: skip


def _rotated(draft: Draft, choose: Choose, z: str, t: int, d: int) -> str:
    half = d // 2
    angle = draft.emit(f"torch.outer(torch.arange({t} * 1.0), {draft.param(half, share=80)})")
    way = choose.int(0, 2)
    if way == 0:
        full = draft.emit(f"torch.cat([{angle}, {angle}], -1)")
        turned = draft.emit(f"torch.cat([-{z}[..., {half}:], {z}[..., :{half}]], -1)")
        return draft.emit(f"{z} * {full}.cos() + {turned} * {full}.sin()")
    if way == 1:
        a, b = draft.emit_many(f"{z}.chunk(2, -1)")
        return draft.emit(
            f"torch.cat([{a} * {angle}.cos() - {b} * {angle}.sin(), {b} * {angle}.cos() + {a} * {angle}.sin()], -1)"
        )
    a, b = draft.emit_many(f"({z}[..., ::2], {z}[..., 1::2])")
    turned = f"torch.stack([{a} * {angle}.cos() - {b} * {angle}.sin(), {a} * {angle}.sin() + {b} * {angle}.cos()], -1)"
    return draft.emit(f"{turned}.flatten(-2)")


def _copied(draft: Draft, choose: Choose, z: str, b: int, kv: int, g: int, t: int, d: int) -> str:
    return draft.emit(choose.one((
        f"{z}.repeat_interleave({g}, 1)",
        f"{z}[:, :, None].expand({b}, {kv}, {g}, {t}, {d}).reshape({b}, {kv * g}, {t}, {d})",
        f"{z}.repeat(1, {g}, 1, 1)",
        f"torch.stack([{z}] * {g}, 2).flatten(1, 2)",
    )))  # fmt: skip


def _by_hand(draft: Draft, choose: Choose, q: str, k: str, v: str, t: int) -> str:
    scores = draft.emit(
        choose.one((f"{q} @ {k}.transpose(-1, -2)", f"torch.einsum('bhqd,bhkd->bhqk', {q}, {k})"))
        + choose.one(("", " / 2.0"))
    )
    if choose.chance(30):
        scores = draft.emit(choose.one((
            f"{scores} + torch.triu(torch.full(({t}, {t}), -9.0), 1)",
            f"{scores}.masked_fill(torch.ones({t}, {t}).triu(1).bool(), -9.0)",
            f"{scores} + {draft.param(draft.shape(scores)[1], 1, 1)}",
        )))  # fmt: skip
    chances = draft.emit(
        choose.one((f"{scores}.softmax(-1)", f"{scores}.softmax(-1)", f"torch.sigmoid({scores})", f"{scores} * 0.1"))
    )
    return draft.emit(choose.one((f"{chances} @ {v}", f"torch.einsum('bhqk,bhkd->bhqd', {chances}, {v})")))


def gated(draft: Draft, choose: Choose) -> None:
    """A gated MLP, its two halves apart or in one product, and back to the stream."""
    x = draft.pick(lambda v: v.dim() > 1)
    n, inner = draft.shape(x)[-1], choose.size()
    act = choose.one(("F.silu", "F.gelu", "torch.sigmoid", "torch.tanh"))
    if choose.chance(50):
        a, b = (
            draft.emit(f"{draft.module(f'nn.Linear({n}, {inner}, bias={choose.chance(50)})')}({x})") for _ in range(2)
        )
    else:
        fused = draft.emit(f"{draft.module(f'nn.Linear({n}, {2 * inner})')}({x})")
        a, b = draft.emit_many(choose.one((
            f"{fused}.chunk(2, -1)", f"{fused}.split({inner}, -1)", f"({fused}[..., :{inner}], {fused}[..., {inner}:])",
            f"({fused}[..., ::2], {fused}[..., 1::2])", f"{fused}.unflatten(-1, (2, {inner})).unbind(-2)",
        )))  # fmt: skip
    mixed = draft.emit(f"{act}({a}) * {b}")
    back = draft.emit(f"{draft.module(f'nn.Linear({inner}, {n}, bias={choose.chance(50)})')}({mixed})")
    if choose.chance(60):
        draft.emit(f"{x} + {back}")


def experts(draft: Draft, choose: Choose) -> None:
    """A mixture of stacked experts, weighed by all or by the best."""
    x = draft.pick(lambda v: v.dim() == 3)
    n, e, inner = draft.shape(x)[-1], choose.one((2, 3, 4)), choose.size()
    scores = draft.emit(f"{draft.module(f'nn.Linear({n}, {e})')}({x}).softmax(-1)")
    if choose.chance(40):
        scores = draft.emit(f"torch.where({scores} >= {scores}.topk(2, -1)[0][..., -1:], {scores}, 0.0)")
    up, down = draft.param(e, inner, n), draft.param(e, n, inner)
    hidden = draft.emit(f"torch.relu(torch.einsum('bth,efh->betf', {x}, {up}))")
    draft.emit(f"torch.einsum('betf,ehf,bte->bth', {hidden}, {down}, {scores})")


def excited(draft: Draft, choose: Choose) -> None:
    """Channels scaled by what a summary of all positions says."""
    x = draft.pick(lambda v: v.dim() == 4)
    c, inner = draft.shape(x)[1], choose.size()
    pooled = draft.emit(choose.one((f"{x}.mean((2, 3), keepdim=True)", f"F.adaptive_avg_pool2d({x}, 1)")))
    small = draft.emit(f"torch.relu({draft.module(f'nn.Conv2d({c}, {inner}, 1)')}({pooled}))")
    draft.emit(f"{x} * torch.sigmoid({draft.module(f'nn.Conv2d({inner}, {c}, 1)')}({small}))")


def separable(draft: Draft, choose: Choose) -> None:
    """Expand, filter each channel on its own, project."""
    x = draft.pick(lambda v: v.dim() == 4)
    c, inner = draft.shape(x)[1], choose.size()
    wide = draft.emit(f"{draft.module(f'nn.Conv2d({c}, {inner}, 1, bias={choose.chance(50)})')}({x})")
    if choose.chance(60):
        wide = draft.emit(f"F.hardswish({draft.module(f'nn.BatchNorm2d({inner})')}({wide}))")
    deep = draft.emit(
        f"{draft.module(f'nn.Conv2d({inner}, {inner}, 3, padding=1, groups={inner}, bias={choose.chance(50)})')}({wide})"
    )
    out = draft.emit(f"{draft.module(f'nn.Conv2d({inner}, {c}, 1)')}(torch.relu({deep}))")
    draft.emit(f"{x} + {out}")


def adapted(draft: Draft, choose: Choose) -> None:
    """A product with a low-rank one beside it."""
    x = draft.pick(lambda v: v.dim() > 1)
    n, out, rank = draft.shape(x)[-1], choose.size(), choose.one((2, 3))
    down, up = draft.param(rank, n), draft.param(out, rank)
    draft.emit(f"{draft.module(f'nn.Linear({n}, {out})')}({x}) + F.linear(F.linear({x}, {down}), {up}) * 0.5")


def mixer(draft: Draft, choose: Choose) -> None:
    """A depthwise convolution along the positions, gated: what state-space blocks begin with."""
    x = draft.pick(lambda v: v.dim() == 3)
    _, t, n = draft.shape(x)
    inner = choose.size()
    a, z = draft.emit_many(f"{draft.module(f'nn.Linear({n}, {2 * inner}, bias=False)')}({x}).chunk(2, -1)")
    moved = draft.emit(
        f"{draft.module(f'nn.Conv1d({inner}, {inner}, 2, padding=1, groups={inner})')}({a}.transpose(1, 2))[..., :{t}]"
    )
    state = draft.emit(
        choose.one(
            (
                f"F.silu({moved}).transpose(1, 2)",
                f"{moved}.cumsum(-1).transpose(1, 2)",
                f"({moved} * {draft.param(inner, 1)}.exp()).mT",
            )
        )
    )
    draft.emit(f"{draft.module(f'nn.Linear({inner}, {n})')}({state} * F.silu({z}))")


BLOCKS = ((gated, 5), (attention, 6), (experts, 2), (excited, 2), (separable, 2), (adapted, 2), (mixer, 2))
