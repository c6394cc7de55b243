"""The small nets that OTO's sanity checks and Torch-Pruning's tests describe, built anew: what leaves, and that it is sound.

Each is checked as a random program is: every group alone and all together, in the graph and in the modules, against the
masked original; cut twice; call by call. The text lists what can go: its size, then the dims that it leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from tests.golden import expect
from tests.oracle.fuzz.check import check_model, double

IMAGE = (2, 3, 7, 9)


def leaves(model: nn.Module, *shapes: tuple[int, ...], modules: bool = True) -> str:
    """What can go, once it has been tried; ``modules``: whether the module backend can say it, too."""
    names = list(model.forward.__code__.co_varnames[1 : 1 + len(shapes)])
    feeds = [{name: torch.randn(shape).double() for name, shape in zip(names, shapes, strict=True)} for _ in range(2)]
    with double(), torch.no_grad():
        _draw(model.double().eval())
        seen = check_model(model, feeds)
        groups = sir.groups(sir.trace(model, feeds[0])).of_axes
    assert seen.plans
    assert 2 * seen.moved > seen.plans
    assert (seen.modules["cut"] > 0) == modules
    return "\n".join(
        f"{g.size:2} " + " ".join(dict.fromkeys(f"{s.parameter.removesuffix('.weight')}:{s.dim}" for s in g.slices
                                                if not s.parameter.endswith(("bias", "running_mean", "running_var"))))
        for g in groups if g.prunable or g.rescalable
    )  # fmt: skip


def _draw(model: nn.Module) -> None:
    """No bias zero, no norm the identity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("var") else drawn.sign() * (drawn.abs() + 0.05) / 2)


class Joined(nn.Module):
    """Two convolutions side by side, normed as one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.norm = nn.BatchNorm2d(18)
        self.out = nn.Conv2d(18, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))))


def test_parts_of_a_concat_go_one_by_one() -> None:
    expect(
        leaves(Joined(), IMAGE),
        """
         8 left:0 norm:0 out:1
        10 right:0 norm:0 out:1
        """,
    )


class JoinedTwice(nn.Module):
    """One convolution reads two images; its two results lie end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.cat([self.shared(self.stem(x)), self.shared(torch.tanh(self.stem(y)))], 1))


def test_both_halves_made_by_one_weight_lose_the_same_channels() -> None:
    expect(
        leaves(JoinedTwice(), IMAGE, IMAGE),
        """
        6 stem:0 shared:1
        8 shared:0 out:1
        """,
    )


class Recurring(nn.Module):
    """One square layer, applied three times, with a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.out = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + torch.relu(self.again(x))
        return self.out(x)


def test_rows_and_columns_of_a_layer_that_reads_itself_go_together() -> None:
    expect(
        leaves(Recurring(), (3, 5)),
        """
        12 stem:0 again:0 again:1 out:1
        """,
    )


class Tied(nn.Module):
    """A decoder that is its encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(12, 5)), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(torch.relu(F.linear(x, self.weight))), self.weight.t())


def test_a_tied_transpose_loses_what_its_weight_loses() -> None:
    expect(
        leaves(Tied(), (3, 5)),
        """
        12 weight:0 inner:0 inner:1
        """,
    )


class InGroups(nn.Module):
    """A convolution in groups between two plain ones; then one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.grouped, self.deep = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.Conv2d(18, 18, 3, padding=1, groups=18)
        self.out = nn.Conv2d(18, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.deep(torch.relu(self.grouped(torch.relu(self.norm(self.stem(x)))))))


def test_groups_of_a_convolution_and_channels_within_them_go() -> None:
    expect(
        leaves(InGroups(), IMAGE),
        """
        3 stem:0 norm:0 grouped:0 deep:0 out:1
        4 stem:0 norm:0 grouped:1
        6 grouped:0 deep:0 out:1
        """,
    )


class Transposed(nn.Module):
    """Up again by transposed convolutions, plain and in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.norm, self.grouped = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 6, 3, groups=2)
        self.out = nn.ConvTranspose2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.grouped(torch.relu(self.norm(self.up(torch.relu(self.down(x))))))))


def test_transposed_convolutions_go_along() -> None:
    expect(
        leaves(Transposed(), IMAGE),
        """
        8 down:0 up:0
        2 up:1 norm:0 grouped:0 out:0
        6 up:1 norm:0 grouped:0
        3 grouped:1 out:0
        """,
    )


class InstanceNormed(nn.Module):
    """Instance norms: with weights after a sum, without any after a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.summed, self.plain = nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(18)
        self.beside, self.out = nn.Conv2d(8, 10, 1), nn.Conv2d(18, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.relu(self.summed(self.one(x) + self.two(x)))
        return self.out(self.plain(torch.cat([both, self.beside(both)], 1)))


def test_channels_go_through_instance_norms_with_and_without_weights() -> None:
    expect(
        leaves(InstanceNormed(), IMAGE),
        """
         8 one:0 two:0 summed:0 beside:1 out:1
        10 beside:0 out:1
        """,
    )


class GroupNormed(nn.Module):
    """Statistics over three channels at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.out = nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.stem(x))))


def test_only_whole_groups_of_a_group_norm_go() -> None:
    expect(
        leaves(GroupNormed(), IMAGE),
        """
        4 stem:0 norm:0 out:1
        """,
    )


class JoinedAndSplit(nn.Module):
    """Laid end to end, split at other places, each part read by a layer of its own, and joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 8), nn.Linear(5, 6)
        self.first, self.second, self.all = nn.Linear(10, 6), nn.Linear(8, 6), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([self.a(x), self.b(x), self.c(x)], -1).split([10, 8], -1)
        return self.all(torch.cat([torch.relu(self.first(first)), self.second(second)], -1))


def test_a_split_elsewhere_than_the_concat_cuts_the_parts_in_two() -> None:
    expect(
        leaves(JoinedAndSplit(), (3, 5)),
        """
        4 a:0 first:1
        6 b:0 first:1
        2 b:0 second:1
        6 c:0 second:1
        6 first:0 all:1
        6 second:0 all:1
        """,
    )


class Cascade(nn.Module):
    """Concats of concats, the dense block's way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.grow = nn.ModuleList(nn.Conv2d(n, 6, 3, padding=1) for n in (4, 10, 16))
        self.out = nn.Conv2d(22, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.grow:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.out(x)


def test_every_reader_of_a_cascade_of_concats_loses_the_part() -> None:
    expect(
        leaves(Cascade(), IMAGE),
        """
        4 stem:0 grow.0:1 grow.1:1 grow.2:1 out:1
        6 grow.0:0 grow.1:1 grow.2:1 out:1
        6 grow.1:0 grow.2:1 out:1
        6 grow.2:0 out:1
        """,
    )


class Unwrapped(nn.Module):
    """Parameters that are no layer's: a scale, a shift, a matrix, tokens in front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(5, 8), nn.Linear(6, 7)
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 1, 8))
        self.token, self.matrix = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.stem(x) * self.scale + self.shift], 1)
        return self.out(torch.relu(x @ self.matrix))


def test_unwrapped_parameters_lose_the_same_channels() -> None:
    expect(
        leaves(Unwrapped(), (3, 4, 5)),
        """
        8 scale:0 shift:2 token:2 matrix:0 stem:0
        6 matrix:1 out:1
        """,
    )


class ManyInAndOut(nn.Module):
    """Two inputs of other widths, one stream, three results."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_y, self.inner = nn.Linear(5, 12), nn.Linear(9, 12), nn.Linear(12, 8)
        self.one, self.two = nn.Linear(8, 7), nn.Linear(12, 4)

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor | dict[str, Tensor]]:
        stream = torch.relu(self.of_x(x) + self.of_y(y))
        inner = torch.tanh(self.inner(stream))
        return [self.one(inner), {"two": self.two(stream), "sum": inner.sum(-1)}]


def test_many_inputs_and_nested_outputs() -> None:
    model = ManyInAndOut()
    expect(
        leaves(Flat(model), (3, 5), (3, 9)).replace("net.", ""),
        """
        12 of_x:0 of_y:0 inner:1 two:1
         8 inner:0 one:1
        """,
    )


class Flat(nn.Module):
    """The tensors of a nested result, in order."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        one, rest = self.net(x, y)
        return (one, *rest.values())


class Flattened(nn.Module):
    """Maps laid out in one vector, by way of a strange view, read by a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8 * 5 * 7, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.out(x.reshape(x.shape[0], 8, -1).reshape(x.shape[0], 2, -1, 7).flatten(1))


def test_a_channel_is_a_run_of_columns_behind_a_flatten() -> None:
    expect(
        leaves(Flattened(), IMAGE),
        """
        2 conv:0 out:1
        4 conv:0 out:1
        """,
    )


class SingleChannel(nn.Module):
    """A map of one channel in the middle, and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
        self.again, self.out = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.again(torch.sigmoid(self.one(torch.relu(self.wide(x)))))))


def test_a_single_channel_stays_and_what_is_around_it_goes() -> None:
    expect(
        leaves(SingleChannel(), IMAGE),
        """
        8 wide:0 one:1
        6 again:0 out:1
        """,
    )


class Unbound(nn.Module):
    """One layer makes three parts, taken apart by number, by chunk and by slice."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(5, 24), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).unflatten(-1, (3, 8)).unbind(-2)
        a, b = torch.chunk(q * torch.sigmoid(k), 2, -1)
        return self.out(torch.cat([a + v[..., 4:], b - v[..., :4]], -1))


def test_parts_taken_by_number_chunk_and_slice_go_together() -> None:
    expect(
        leaves(Unbound(), (3, 5), modules=False),
        """
        4 all:0 out:1
        """,
    )
