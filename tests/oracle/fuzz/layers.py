"""Steps with parameters: products, convolutions, norms, tables; raw parameters, shared ones and tied transposes."""

from __future__ import annotations

import math

from tests.oracle.fuzz.draft import Choose, Draft, Misfit


def linear(draft: Draft, choose: Choose) -> None:
    """The last dim becomes another, in one of the ways that people write it."""
    x = draft.pick(lambda v: v.dim() > 0)
    n, out = draft.shape(x)[-1], choose.size()
    way = choose.int(0, 9)
    if way <= 2:
        draft.emit(f"{draft.module(f'nn.Linear({n}, {out}, bias={choose.chance(60)})')}({x})")
    elif way == 3:
        draft.emit(f"F.linear({x}, {draft.param(out, n)}, {draft.param(out)})")
    elif way == 4:
        draft.emit(f"{x} @ {draft.param(n, out)}")
    elif way == 5:
        draft.emit(f"F.linear({x}, {draft.param(n, out, share=60)}.t())")
    elif way == 6:
        draft.emit(f"torch.einsum('...i,oi->...o', {x}, {draft.param(out, n)})")
    elif way == 7:
        draft.emit(f"torch.addmm({draft.param(out)}, {x}.reshape(-1, {n}), {draft.param(n, out)})")
    elif way == 8:
        draft.emit(f"torch.tensordot({x}, {draft.param(n, out)}, dims=1)")
    else:
        again = [line for line in draft.setup if line.endswith("bias=False)") and f"Linear({n}, " in line]
        draft.emit(f"{choose.one(again).split(' = ')[0]}({x})")


def square(draft: Draft, choose: Choose) -> None:
    """A layer that comes back to the width it read, so that residuals and weight sharing follow."""
    x = draft.pick(lambda v: v.dim() > 0)
    n = draft.shape(x)[-1]
    y = draft.emit(f"F.linear({x}, {draft.param(n, n, share=60)})")
    if choose.chance(50):
        draft.emit(f"{x} + {y}")


def conv(draft: Draft, choose: Choose) -> None:
    """Convolutions of one or two dims, in groups, depthwise, transposed."""
    x = draft.pick(lambda v: v.dim() in (3, 4))
    shape = draft.shape(x)
    n, rank = shape[1], len(shape) - 2
    groups = choose.one([1, *(g for g in range(2, n + 1) if n % g == 0)])
    out = groups * choose.one((1, 2, 3)) if groups > 1 else choose.size()
    kernel = choose.one([k for k in (1, 2, 3) if k <= min(shape[2:])])
    kind = "ConvTranspose" if choose.chance(30) else "Conv"
    stride = choose.one((1, 1, 2))
    if choose.chance(25) and kind == "Conv":
        sizes = (out, n // groups, *[kernel] * rank)
        draft.emit(f"F.conv{rank}d({x}, {draft.param(*sizes)}, None, {stride}, {kernel // 2}, 1, {groups})")
    else:
        made = f"nn.{kind}{rank}d({n}, {out}, {kernel}, {stride}, {kernel // 2}, groups={groups}, bias={choose.chance(60)})"
        draft.emit(f"{draft.module(made)}({x})")


def norm(draft: Draft, choose: Choose) -> None:
    """Normalisation, by module, by function and by hand."""
    x = draft.pick(lambda v: v.dim() > 1)
    shape = draft.shape(x)
    n, c = shape[-1], shape[1]
    way = choose.int(0, 11)
    groups = choose.one([g for g in range(1, c + 1) if c % g == 0])
    made = {
        0: f"nn.RMSNorm({n}, eps=1e-5)",
        1: f"nn.BatchNorm{max(len(shape) - 2, 1)}d({c}, affine={choose.chance(70)})",
        2: f"nn.GroupNorm({groups}, {c}, affine={choose.chance(70)})",
        3: f"nn.InstanceNorm{max(len(shape) - 2, 1)}d({c}, affine={choose.chance(60)}, track_running_stats={choose.chance(40)})",
        4: f"nn.LayerNorm({n})",
    }
    if way in made:
        draft.emit(f"{draft.module(made[way])}({x})")
    elif way == 5:
        draft.emit(f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-5) * {draft.param(n)}")
    elif way == 6:
        draft.emit(f"F.rms_norm({x}, ({n},), {draft.param(n)})")
    elif way == 7:
        draft.emit(f"F.rms_norm({x}, ({n},))")
    elif way == 8:
        draft.emit(f"F.layer_norm({x}, {shape[-2:]})")
    elif way == 9:
        draft.emit(f"{x} / ({x}.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1.0 + {draft.param(n)})")
    elif way == 10:
        draft.emit(f"F.rms_norm({x}, {shape[-2:]}, {draft.param(*shape[-2:])}, 1e-5)")
    else:
        centred = draft.emit(f"{x} - {x}.mean(-1, keepdim=True)")
        draft.emit(f"{centred} / torch.sqrt({centred}.pow(2).mean(-1, keepdim=True) + 1e-5) * {draft.param(n)}")


def raw(draft: Draft, choose: Choose) -> None:
    """An unwrapped parameter as a value."""
    draft.expose(*(choose.size() for _ in range(choose.int(1, 3))))


def stacked(draft: Draft, choose: Choose) -> None:
    """A product for each of several stacked matrices."""
    x = draft.pick(lambda v: v.dim() == 3)
    b, _, n = draft.shape(x)
    out = choose.size()
    way = choose.int(0, 4)
    if way == 0:
        draft.emit(f"torch.bmm({x}, {draft.param(b, n, out)})")
    elif way == 1:
        draft.emit(f"torch.baddbmm({draft.param(b, 1, out)}, {x}, {draft.param(b, n, out)})")
    elif way == 2:
        draft.emit(f"torch.einsum('bti,ehi->beth', {x}, {draft.param(choose.one((2, 3)), out, n)})")
    elif way == 3:
        heads = choose.one((2, 3))
        draft.emit(f"torch.einsum('bti,hio->bhto', {x}, {draft.param(heads, n, out)})")
    else:
        draft.emit(f"F.bilinear({x}, {x}, {draft.param(out, n, n)}, {draft.param(out)})")


def table(draft: Draft, choose: Choose) -> None:
    """Rows of a table, chosen by an input or by constants."""
    width = choose.size()
    if draft.ids and choose.chance(70):
        ids = choose.one(draft.ids)
        made = draft.module(f"nn.Embedding(6, {width})")
        draft.emit(f"{made}({ids})" if choose.chance(70) else f"F.embedding({ids}, {draft.param(6, width)})")
    else:
        weight = draft.param(6, width)
        draft.emit(
            choose.one((f"{weight}[[0, 2, 3]]", f"F.embedding(torch.tensor([1, 0]), {weight})", f"{weight}[:4]"))
        )


def view(draft: Draft, choose: Choose) -> None:
    """Any other shape of as many elements, also a strange one."""
    x = draft.pick()
    left = math.prod(draft.shape(x))
    sizes: list[int] = []
    while left > 1 and len(sizes) < 4 and (not sizes or choose.chance(75)):
        sizes.append(choose.one([k for k in range(2, min(left, 24) + 1) if left % k == 0] or [left]))
        left //= sizes[-1]
    sizes.append(left)
    draft.emit(f"{x}.reshape({', '.join(map(str, sizes))})")


def merged(draft: Draft, choose: Choose) -> None:
    """Two neighbours become one, or one becomes two."""
    x = draft.pick(lambda v: v.dim() > 0)
    shape = list(draft.shape(x))
    place = choose.int(0, len(shape) - 1)
    if place + 1 < len(shape) and choose.chance(50):
        shape[place : place + 2] = [shape[place] * shape[place + 1]]
    else:
        k = choose.one([k for k in range(2, shape[place]) if shape[place] % k == 0])
        shape[place : place + 1] = [k, shape[place] // k]
    draft.emit(
        f"{x}.view({', '.join(map(str, shape))})" if choose.chance(40) else f"{x}.reshape({', '.join(map(str, shape))})"
    )


def order(draft: Draft, choose: Choose) -> None:
    """Dims in any order."""
    x = draft.pick(lambda v: v.dim() > 1)
    left = list(range(len(draft.shape(x))))
    dims = [left.pop(choose.int(0, len(left) - 1)) for _ in list(left)]
    draft.emit(f"{x}.permute({', '.join(map(str, dims))})")


def joined(draft: Draft, choose: Choose) -> None:
    """Two or three values laid end to end."""
    x = draft.pick(lambda v: v.dim() > 0)
    shape = draft.shape(x)
    place = choose.int(0, len(shape) - 1) if choose.chance(50) else len(shape) - 1

    def fits(other: object) -> bool:
        sizes = tuple(other.shape)  # type: ignore[attr-defined]
        return len(sizes) == len(shape) and all(
            a == b for d, (a, b) in enumerate(zip(sizes, shape, strict=True)) if d != place
        )

    parts = [x, *(draft.pick(fits) for _ in range(choose.int(1, 2)))]
    draft.emit(f"torch.cat([{', '.join(parts)}], {place})")


def repeated(draft: Draft, choose: Choose) -> None:
    """Copies along dims, end to end."""
    x = draft.pick()
    counts = [choose.one((1, 1, 2, 3)) for _ in draft.shape(x)]
    if choose.chance(20):
        counts.insert(0, 2)
    draft.emit(f"{x}.repeat({', '.join(map(str, counts))})")


def expanded(draft: Draft, choose: Choose) -> None:
    """Dims of size one become longer, dims that were not there come."""
    x = draft.pick(lambda v: 1 in v.shape or v.dim() < 4)
    sizes = [choose.size() if n == 1 else -1 for n in draft.shape(x)]
    if 1 not in draft.shape(x):
        sizes.insert(0, choose.size())
    draft.emit(f"{x}.expand({', '.join(map(str, sizes))})")


def recurrent(draft: Draft, choose: Choose) -> None:
    """Layers that carry a state."""
    x = draft.pick(lambda v: v.dim() == 3)
    n, out = draft.shape(x)[-1], choose.size()
    kind = choose.one(("LSTM", "GRU", "RNN"))
    made = draft.module(f"nn.{kind}({n}, {out}, batch_first=True, bidirectional={choose.chance(25)})")
    draft.emit(f"{made}({x})[0]")


STEPS = (
    (linear, 16), (square, 4), (conv, 9), (norm, 7), (raw, 2), (stacked, 4), (table, 3), (view, 4), (merged, 5), (order, 4),
    (joined, 4), (repeated, 2), (expanded, 2), (recurrent, 1),
)  # fmt: skip

__all__ = ["STEPS", "Misfit"]
