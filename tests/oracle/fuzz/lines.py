"""Steps of one line each, as text with places for values, dims and numbers.

``{x}`` a value; ``{y}`` another of its shape; ``{b}`` one that broadcasts with it; ``{d}`` and ``{e}`` two of its
dims; ``{n}`` the size of ``{d}``; ``{i} < {j}`` numbers up to it; ``{k}`` a divisor of it, ``{m}`` n over k; ``{last}``
and ``{second}`` parameters as long as the last dim and as dim 1; ``{q}`` a parameter that broadcasts with x.
"""

from __future__ import annotations

import re

from tests.oracle.fuzz.draft import Choose, Draft, Misfit

ELEMENTWISE = (
    "torch.relu({x})", "torch.tanh({x})", "F.gelu({x})", "F.silu({x})", "{x} * 1.5", "{x} / 1.7", "-{x}", "{x}.abs()",
    "torch.sin({x})", "F.leaky_relu({x}, 0.2)", "{x}.square()", "torch.clamp({x}, -1, 1)", "F.hardswish({x})",
    "F.dropout({x}, 0.5, self.training)", "{x}.clone()", "{x}.contiguous()", "torch.erf({x})", "F.softsign({x})",
    "F.relu6({x})", "F.elu({x})", "torch.expm1({x}.clamp(max=2.0))", "{x}.abs().sqrt()", "{x}.pow(3)",
    "torch.log1p({x}.abs())", "{x}.detach()", "F.hardtanh({x})", "torch.atan({x})", "F.prelu({x}, {second})",
)  # fmt: skip
"""Zero stays zero."""

NOT_ZERO = (
    "torch.sigmoid({x})", "torch.exp({x}.clamp(max=3.0))", "torch.cos({x})", "{x} + 1.0", "F.softplus({x})",
    "1.0 - {x}", "torch.clamp({x}, min=0.2)", "torch.rsqrt({x}.square() + 0.3)", "{x} / ({x}.abs() + 1.0)",
    "1.0 / (1.3 + {x}.abs())", "torch.pow({x}.abs() + 0.2, 0.5)", "torch.logaddexp({x}, {y})", "torch.maximum({x}, {q})",
    "F.hardsigmoid({x})", "torch.where({x} > 0.137, {x}, 0.5)", "{x}.masked_fill({x} < 0.137, -1.0)",
    "torch.ones_like({x}) * {x}.mean()", "torch.full_like({x}, 0.7)", "torch.zeros_like({x})",
    "torch.nan_to_num({x})", "F.threshold({x}, 0.137, 0.4)", "torch.rsub({x}, 2.0)", "torch.add({x}, 1.0, alpha=0.5)",
)  # fmt: skip

BINARY = (
    "{x} + {y}", "{x} - {y}", "{x} * {y}", "{x} * torch.sigmoid({y})", "F.silu({x}) * {y}", "torch.maximum({x}, {y})",
    "{x} + {b}", "{x} * {b}", "{x} - {b}", "{x} + {q}", "{x} * {q}", "{q} - {x}", "{x} * {last} + {last}",
    "{x} + {last}", "torch.where({x} > 0.137, {x}, {y})", "torch.addcmul({x}, {y}, {x})", "{x} / ({y}.abs() + 0.5)",
    "torch.lerp({x}, {y}, 0.3)", "torch.where({y} > 0.137, {x}, 0.0)", "{x}.masked_fill({y} < 0.137, 0.0)",
    "torch.minimum({x}, {b})", "{x} * torch.tanh({q})", "{x}.add({b}, alpha=2.0)", "torch.stack([{x}, {y}]).mean(0)",
    "torch.atan2({x}, {y}.square() + 0.4)", "torch.add({x}, {b}.expand_as({x}))", "{x} + torch.ones({n}).unsqueeze(-1)",
)  # fmt: skip

DIVISORS = (
    "{x} / {y}", "{x} / {b}", "{x} / {q}", "{x} / {last}", "1.0 / {x}", "{x} / {x}.exp()", "{x} / torch.sigmoid({y})",
    "{x} / F.softplus({b})", "{x} / torch.cos({y})", "torch.log({x}.abs())", "torch.rsqrt({x}.square())",
    "{x}.abs().pow(-0.5)", "torch.reciprocal({y}) * {x}", "torch.acosh({x}.abs() + 1.0)", "torch.logit(torch.sigmoid({x}))",
    "{x} / torch.where({x} > 0.137, {x}, 0.5)", "{x} / {x}.masked_fill({x} < 0.137, -1.0)", "{x} / torch.lerp({x}, {y}, 0.3)",
    "{x} / torch.where({y} == 0.0, 1.0, {y})", "torch.fmod(torch.ones_like({x}), {x})", "torch.remainder({x}, {y})",
    "torch.addcdiv({x}, {y}, {x})", "torch.pow({x}.abs(), {y})", "torch.xlogy({x}, {y}.abs())", "torch.polygamma(1, {x}.square())",
    "{x} / {x}.amax({d}, keepdim=True)", "{x} / {x}.abs().max({d}, keepdim=True)[0]", "{x} / {x}.cumsum({d})",
    "{x} / {x}.sort({d})[0]", "{x} / {x}.median({d}, keepdim=True)[0]", "{x} / {x}.cummax({d})[0]", "{x} / {x}.cumprod({d})",
    "{x} / {x}.std({d}, keepdim=True)", "{x} * torch.rsqrt({x}.var({d}, keepdim=True))", "{x} / {x}.norm(dim={d}, keepdim=True)",
    "{x} / {x}.abs().sum({d}, keepdim=True)", "{x} / {x}.mean({d}, keepdim=True)", "{x} / {x}.prod({d}, keepdim=True)",
    "{x} / {x}.logcumsumexp({d})", "{x} / {x}.logsumexp({d}, keepdim=True)", "{x} / {x}.softmax({d})", "{x} / {x}.exp().cumsum({d})",
    "{x}.exp() / {x}.exp().sum({d}, keepdim=True)", "{x} / {x}.flip({d})", "{x} / {x}.roll(1, {d})", "{x} / torch.clamp({y}.abs(), 0.01)",
    "{x} / torch.cat([{y}.narrow({d}, 0, {i}), {x}.narrow({d}, {i}, {n} - {i})], {d})", "{x} / torch.maximum({x}.abs(), {q}.abs())",
    "{x} / {x}.scatter({d}, torch.zeros_like({x}, dtype=torch.long), {y})", "{x} / torch.expm1({y}.abs())",
    "{x} / torch.zeros_like({x}).index_add({d}, torch.arange({n}), {x})", "{x} / {x}.gather({d}, torch.zeros_like({x}, dtype=torch.long))",
    "{x} / torch.slice_scatter({x}, {x}.narrow({d}, 0, 1), {d}, {i}, {i} + 1)", "F.layer_norm({x}, {x}.shape[-1:], eps=0.0)",
    "F.rms_norm({x}, {x}.shape[-1:], eps=0.0)", "{x} / (torch.tanh({x}) + 1.0)", "{x} / ({y} - {x})", "{x} / torch.hypot({x}, {y})",
)  # fmt: skip
"""Divided by what may be zero, where a channel is removed if nowhere else."""

OVER_A_DIM = (
    "{x}.sum({d})", "{x}.sum({d}, keepdim=True)", "{x}.mean({d})", "{x}.mean({d}, keepdim=True)", "{x}.sum(({d}, {e}))",
    "{x}.mean(({d}, {e}), keepdim=True)", "{x}.softmax({d})", "{x}.log_softmax({d})", "{x}.cumsum({d})",
    "{x}.amax({d})", "{x}.max({d})[0]", "{x}.amin({d}, keepdim=True)", "{x}.var({d})", "{x}.std({d}, correction=0)",
    "{x}.logsumexp({d})", "{x}.norm(dim={d})", "F.normalize({x}, dim={d})", "torch.linalg.vector_norm({x}, 1, {d})",
    "{x} * torch.rsqrt({x}.pow(2).mean({d}, keepdim=True) + 1e-5)", "{x}.topk({k}, {d})[0]", "{x}.sort({d})[0]",
    "{x}.flip({d})", "{x}.roll(1, {d})", "{x}.cummax({d})[0]", "{x} - {x}.mean({d}, keepdim=True)", "{x}.prod({d})",
    "{x} - {x}.amax({d}, keepdim=True)", "{x} / ({x}.abs().sum({d}, keepdim=True) + 0.1)", "{x}.sum()", "{x}.mean()",
    "{x}.diff(dim={d})", "torch.count_nonzero({x} > 0.137, {d}) * 1.0", "F.glu({x}, {d})", "{x}.std({d}, keepdim=True)",
    "F.softmin({x}, {d})", "{x}.median({d})[0]", "torch.trapezoid({x}, dim={d})",
)  # fmt: skip

VIEWS = (
    "{x}.transpose({d}, {e})", "{x}.transpose({d}, {e}).contiguous()", "{x}.unsqueeze({d})", "{x}.squeeze()",
    "{x}.squeeze({d})", "{x}.flatten({d})", "{x}.flatten(0, {d})", "{x}.flatten()", "{x}.unflatten({d}, ({k}, {m}))",
    "{x}.unflatten({d}, ({m}, -1))", "{x}.movedim({d}, {e})", "{x}.mT", "{x}.repeat_interleave({k}, {d})",
    "{x}.unsqueeze(0).expand(3, *{x}.shape)", "{x}.unsqueeze({d}).repeat_interleave(2, {d})", "torch.tile({x}, (2,))",
    "{x}.unflatten({d}, ({k}, {m})).transpose({d}, {d} + 1).flatten({d}, {d} + 1)", "{x}.reshape(-1, {x}.shape[-1])",
    "torch.cat([{x}, {x}], {d})", "torch.cat([{x}, -{x}], {d})", "torch.cat([{x}, {y}], {d})", "torch.stack([{x}, {y}], {d})",
    "torch.stack([{x}, {y}], -1).flatten(-2)", "F.pad({x}, (0, 1))", "F.pad({x}, (1, 0, 0, 1))", "F.pad({x}, (0, 1), value=0.5)",
    "F.pad({x}, (0, -1))", "F.pad({x}, (1, 1), mode='replicate')", "{x}.permute(*reversed(range({x}.dim())))",
    "{x}.unfold({d}, 2, 1)", "{x}.expand(2, *{x}.shape)[1]", "torch.rot90({x}, 1, ({d}, {e}))", "{x}.unflatten({d}, (-1, {k})).sum({d})",
    "{x}.swapaxes({d}, {e}).reshape({x}.shape)", "{x}.as_strided({x}.shape, {x}.stride())", "{x}.diagonal(0, {d}, {e})",
    "torch.tril({x})", "{x}.view_as({y})", "{x}.reshape_as({y}) + {y}", "torch.atleast_3d({x})", "torch.broadcast_tensors({x}, {b})[0]",
    "torch.broadcast_tensors({x}, {b})[1]", "torch.block_diag({x}.flatten(1), {x}.flatten(1))", "torch.column_stack([{x}, {y}])",
)  # fmt: skip

PARTS = (
    "{x}.narrow({d}, {i}, {j} - {i})", "{x}.select({d}, {i})", "{x}[..., {i}:]", "{x}[..., :{j}]", "{x}[..., ::2]",
    "{x}[..., 1::2]", "{x}[:, {i}]", "{x}[:, -1]", "{x}[0]", "{x}[:, None]", "{x}[..., [0, 1]]", "{x}[:, [1, 0, 1]]",
    "{x}.index_select({d}, torch.tensor([0, {i}]))", "{x}.gather({d}, torch.zeros_like({x}, dtype=torch.long))",
    "torch.take_along_dim({x}, {y}.argsort({d}), {d})", "{x}[..., {x}.shape[-1] // 2 :]", "{x}[:, {i}:{j}] + {x}[:, {i}:{j}]",
    "torch.cat([{x}[..., {i}:], {x}[..., :{i}]], -1)", "torch.cat((-{x}[..., {m}:], {x}[..., :{m}]), -1)",
    "torch.select_scatter({x}, {x}.select({d}, 0) * 2.0, {d}, {i})", "torch.slice_scatter({x}, {x}.narrow({d}, 0, 1), {d}, {i}, {i} + 1)",
    "{x}.index_add({d}, torch.tensor([0]), {x}.narrow({d}, {i}, 1))", "{x}.scatter({d}, torch.zeros_like({x}, dtype=torch.long), {y})",
    "{x}.index_fill({d}, torch.tensor([{i}]), 0.3)", "torch.where(torch.arange({x}.shape[-1]) < {i}, {x}, 0.0)",
    "{x} * torch.arange(1.0, {x}.shape[-1] + 1.0)", "{x} * torch.arange({n} * 1.0).view(-1, *[1] * ({x}.dim() - 1 - {d}))",
    "{x} * (torch.arange({x}.shape[-1]) % 2)", "{x} + F.one_hot(torch.tensor({i}), {n}).view(-1, *[1] * ({x}.dim() - 1 - {d}))",
    "{x} * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.5, 2.5, 3.5])[: {x}.shape[-1]]",
)  # fmt: skip

SEVERAL = (
    "{x}.chunk({k}, {d})", "{x}.split({m}, {d})", "{x}.unbind({d})", "{x}.split([{j}, {n} - {j}], {d})", "{x}.tensor_split(2, {d})",
    "{x}.tensor_split([{i}], {d})", "({x}[..., ::2], {x}[..., 1::2])", "{x}.chunk(2, -1)", "{x}.chunk(3, -1)", "torch.hsplit({x}, {k})",
    "{x}.unflatten({d}, ({k}, {m})).unbind({d})", "torch.meshgrid({x}.flatten()[:3], {y}.flatten()[:2], indexing='ij')",
)  # fmt: skip

PRODUCTS = (
    "{x} @ {x}.mT", "{x}.mT @ {x}", "{x} @ {y}.mT", "torch.einsum('...i,...j->...ij', {x}, {y})", "({x} @ {x}.mT).softmax(-1) @ {x}",
    "torch.einsum('...i,...i->...', {x}, {y})", "torch.inner({x}, {y})", "torch.tensordot({x}, {y}, dims=([{d}], [{d}]))",
    "torch.einsum('bi...,bj...->bij...', {x}, {y})", "torch.outer({x}.flatten()[:6], {y}.flatten()[:4])", "torch.matmul({x}, {last})",
    "torch.baddbmm({x}, {x} @ {x}.mT, {x})", "torch.cdist({x}, {y})", "torch.kron({x}, {last})", "torch.cosine_similarity({x}, {y}, {d})",
    "F.scaled_dot_product_attention({x}, {y}, {x})", "torch.einsum('ab,ac->bc', {x}, {y})", "torch.bmm({x}, {y}.transpose(1, 2))",
)  # fmt: skip

POSITIONS = (
    "F.max_pool1d({x}, 2, 1)", "F.avg_pool1d({x}, 2, 1)", "F.max_pool2d({x}, 2, 1)", "F.avg_pool2d({x}, 2, 1, 1)", "F.adaptive_avg_pool2d({x}, 1)",
    "F.adaptive_avg_pool1d({x}, 2)", "F.interpolate({x}, scale_factor=2)", "F.adaptive_max_pool2d({x}, 1)", "F.pixel_shuffle({x}, 2)",
    "F.pixel_unshuffle({x}, 2)", "F.channel_shuffle({x}, 2)", "F.unfold({x}, 2)", "F.interpolate({x}, scale_factor=2, mode='linear')",
    "F.interpolate({x}, size=(3, 5), mode='bilinear')", "F.local_response_norm({x}, 2)", "{x}.mean((2, 3))", "{x}.flatten(2).transpose(1, 2)",
    "F.avg_pool1d({x}.transpose(1, 2), 2).transpose(1, 2)", "{x}.mean((2, 3), keepdim=True)", "F.lp_pool2d({x}, 2, 2)",
)  # fmt: skip

WRITES = (
    "{x}.add_(1.0)", "{x}.mul_(2.0)", "{x}.add_({b})", "{x}.mul_({b})", "{x}[..., :{j}].add_(1.0)", "{x}[..., {i}].zero_()",
    "{x}.copy_({y})", "{x}.relu_()", "{x}[:, {i}].copy_({x}[:, 0])", "{x}.transpose({d}, {e}).add_(0.5)", "{x}.fill_(0.3)",
    "{x}.masked_fill_({x} > 0.137, 0.2)", "{x}.sub_({q})", "{x}.flatten()[0:2].mul_(0.5)", "{x}.narrow({d}, {i}, {j} - {i}).mul_(-1.0)",
    "{x}.clamp_(min=-0.3)", "{x}.sigmoid_()", "{x}.select({d}, {i}).add_(0.7)", "{x}.div_({y}.abs() + 1.0)", "{x}.div_({y})", "{x}.unbind(0)[0].add_(1.0)",
)  # fmt: skip

PLACES = re.compile(r"\{(\w+)\}")


def line(draft: Draft, choose: Choose, template: str) -> None:
    """Fill in a template and add it."""
    draft.emit(filled(draft, choose, template)[0])


def several(draft: Draft, choose: Choose, template: str) -> None:
    """A line that makes several values."""
    draft.emit_many(filled(draft, choose, template)[0])


def write(draft: Draft, choose: Choose, template: str) -> None:
    """A line that writes to a value."""
    text, name = filled(draft, choose, template)
    draft.write(name, text)


def filled(draft: Draft, choose: Choose, template: str) -> tuple[str, str]:
    """The text with its places filled, and the name of ``{x}``."""
    wanted = set(PLACES.findall(template))
    x = draft.pick()
    shape = draft.shape(x)
    found: dict[str, object] = {"x": x}
    if "y" in wanted:
        found["y"] = draft.pick(lambda v: tuple(v.shape) == shape)
    if "b" in wanted:
        found["b"] = draft.pick(
            lambda v: tuple(v.shape) != shape and v.dim() <= len(shape) and _broadcasts(tuple(v.shape), shape)
        )
    if wanted & set("deijkmn"):
        _numbers(choose, shape, found)
    if "last" in wanted:
        found["last"] = draft.param(*shape[-1:])
    if "second" in wanted:
        found["second"] = draft.param(*shape[1:2])
    if "q" in wanted:
        kept = [n if choose.chance(60) else 1 for n in shape]
        found["q"] = draft.param(*kept[choose.int(0, max(len(kept) - 1, 0)) :])
    return PLACES.sub(lambda place: str(found[place[1]]), template), x


def _numbers(choose: Choose, shape: tuple[int, ...], found: dict[str, object]) -> None:
    d = choose.int(0, len(shape) - 1) if choose.chance(50) else len(shape) - 1
    if d < 0:
        raise Misfit
    n = shape[d]
    i = choose.int(0, n - 1)
    k = choose.one([k for k in range(1, n + 1) if n % k == 0])
    found |= {
        "d": d,
        "e": choose.int(0, len(shape) - 1),
        "n": n,
        "i": i,
        "j": choose.int(i, n - 1) + 1,
        "k": k,
        "m": n // k,
    }


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(small), reversed(large), strict=False))
