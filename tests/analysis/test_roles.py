"""What an axis is for: by the calls that make and read it, also where a norm or a weight of its own hides that."""

from __future__ import annotations

import inspect
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir


class Normed(nn.Module):
    """A norm between two maps, over what the first one makes or over what is activated first."""

    def __init__(self, activated: bool) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(10, 14), nn.RMSNorm(14), nn.Linear(14, 6)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        made = self.up(x)
        return torch.tanh(self.down(self.norm(nn.functional.silu(made) if self.activated else made)))


def kind_between(model: Normed) -> str:
    groups = sir.groups(sir.trace(model, {"x": torch.randn(3, 7, 10)}))
    (between,) = (g for g in groups if "norm.weight" in g.parameters)
    assert between.rescalable
    return between.kind


def test_a_latent_that_is_normed_as_it_is_made_is_no_channel_of_an_mlp() -> None:
    assert kind_between(Normed(activated=False)) == "other"


def test_channels_that_are_normed_once_they_are_activated_are_those_of_an_mlp() -> None:
    assert kind_between(Normed(activated=True)) == "ffn"


class ResponseNormed(nn.Module):
    """Channels scaled by their share of the response and added to themselves, as ConvNeXt V2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 6)
        self.weight, self.bias, self.eps = nn.Parameter(torch.randn(14)), nn.Parameter(torch.randn(14)), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        made = nn.functional.gelu(self.up(x))
        response = torch.linalg.vector_norm(made, dim=1, keepdim=True)
        share = response / (response.mean(-1, keepdim=True) + self.eps)
        return torch.tanh(self.down(self.weight * (made * share) + self.bias + made))


@pytest.mark.parametrize("backend", ["graph", "module"])
def test_channels_that_a_norm_of_their_own_is_added_to_are_no_stream(backend: Literal["graph", "module"]) -> None:
    torch.manual_seed(0)
    model, feed = ResponseNormed().double(), {"x": torch.randn(3, 7, 10, dtype=torch.float64)}
    program = sir.trace(model, feed)
    (channels,) = (g for g in sir.groups(program).of_axes if "weight" in g.parameters)
    assert (channels.kind, channels.rescalable) == ("ffn", True)
    plan = sir.plan(program, ratio=0.3, kinds=("ffn",))
    small = sir.shear(model, plan, backend=backend, inputs=feed)
    report = sir.verify(model, small, plan, feed)
    assert report.moved > 0.01
    assert report.max_abs_diff <= 1e-12


class Pooled(nn.Module):
    """Attention over queries, keys and values that are pooled and normed for each head, with the queries added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out, self.head = (nn.Linear(*size) for size in ((6, 16), (16, 45), (15, 16), (16, 4)))
        self.pools = nn.ModuleList(nn.Conv1d(5, 5, 3, padding=1, groups=5, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, length, _ = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, 3, 5).permute(2, 0, 3, 4, 1).flatten(1, 2).unbind(0)
        pooled = (pool(part).transpose(1, 2) for pool, part in zip(self.pools, parts, strict=True))
        heads = (norm(part.reshape(batch, 3, length, 5)) for norm, part in zip(self.norms, pooled, strict=True))
        q, k, v = heads
        mixed = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v + q
        out: Tensor = self.head(x + self.out(mixed.transpose(1, 2).reshape(batch, length, 15)))
        return out


def kinds_of(model: nn.Module, *inputs: Tensor) -> dict[int, str]:
    """Kinds by size, of axes in parameters that do more than lie along positions."""
    names = list(inspect.signature(model.forward).parameters)
    groups = sir.groups(sir.trace(model.eval(), dict(zip(names, inputs, strict=True))))
    return {g.size: g.kind for g in groups.of_axes if g.kind != "other" and g.size > 2}


def test_heads_of_pooled_attention_are_heads() -> None:
    found = kinds_of(Pooled(), torch.randn(2, 7, 6))
    assert found == {16: "residual", 3: "kv_head", 5: "head_dim"}


class Modulated(nn.Module):
    """A convolution for each sample, whose kernel a style scales and whose scale a norm takes back."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.stem, self.out = nn.Linear(7, 8), nn.Conv2d(3, 8, 1), nn.Conv2d(10, 2, 1)
        self.kernel = nn.Parameter(torch.randn(1, 10, 8, 3, 3))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.stem(x)
        batch, _, height, width = x.shape
        kernel = self.kernel * self.style(style).view(batch, 1, -1, 1, 1)
        kernel = kernel * torch.rsqrt(kernel.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        y = nn.functional.conv2d(x.reshape(1, -1, height, width), kernel.flatten(0, 1), padding=1, groups=batch)
        out: Tensor = self.out(y.view(batch, -1, height, width).relu())
        return out


class Mixed(nn.Module):
    """A convolution for each sample, whose kernel is a mixture of several."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Conv2d(10, 2, 1)
        self.kernels = nn.Parameter(torch.randn(4, 10, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, _, height, width = x.shape
        shares = self.gate(x.mean((2, 3))).softmax(-1)
        kernel = torch.einsum("be,eoikl->boikl", shares, self.kernels).flatten(0, 1)
        y = nn.functional.conv2d(x.reshape(1, -1, height, width), kernel, padding=1, groups=batch)
        out: Tensor = self.out(y.view(batch, -1, height, width).relu())
        return out


IMAGE = torch.randn(2, 3, 5, 6)


def test_channels_of_a_convolution_are_channels_whatever_its_kernel_is_made_of() -> None:
    channels = {10: "conv_channel", 8: "conv_channel", 3: "conv_channel"}
    assert kinds_of(Modulated(), IMAGE, torch.randn(2, 7)) == channels
    assert kinds_of(Mixed(), IMAGE) == {**channels, 4: "expert"}


@pytest.mark.parametrize("backend", ["graph", "module"])
@pytest.mark.parametrize(("model", "kind"), [(Modulated, "conv_channel"), (Mixed, "conv_channel"), (Mixed, "expert")])
def test_a_convolution_in_as_many_groups_as_samples_is_cut(
    model: type[nn.Module], kind: str, backend: Literal["graph", "module"]
) -> None:
    torch.manual_seed(0)
    feed = {"x": IMAGE, "style": torch.randn(2, 7)} if model is Modulated else {"x": IMAGE}
    dense = model().eval()
    plan = sir.plan(sir.trace(dense, feed), ratio=0.3, kinds=(kind,))
    small = sir.shear(dense, plan, inputs=feed, backend=backend)
    more = {name: torch.cat([value, value.flip(0)[:1] * 2]) for name, value in feed.items()}
    sir.verify(dense, small, plan, [feed, more]).raise_if_unsound()


class Added(nn.Module):
    def __init__(self, ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, ffn), nn.Linear(ffn, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Scaled(nn.Module):
    def __init__(self, ffn: int) -> None:
        super().__init__()
        self.ffn = Added(ffn)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ffn(x) * 2
        return out


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec, self.head = Scaled(10), Scaled(12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.dec(self.enc(x)))
        return out


def test_a_group_of_blocks_is_in_a_module_that_exists() -> None:
    model = Siblings().eval()
    (blocks,) = sir.groups(sir.trace(model, torch.randn(2, 7, 6))).blocks
    assert [unit.path for unit in blocks.units] == ["enc.ffn", "dec.ffn"]
    assert blocks.module == ""
