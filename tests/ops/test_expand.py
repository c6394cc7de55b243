"""Copies: the axis that counts them is a new one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.golden import expect
from tests.ops.typed import typed
from tests.roads import trace, units


def test_expand_counts_copies_by_a_new_axis() -> None:
    expect(
        typed(lambda x: x[:, None].expand(5, 3, 4), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, c:3, b:4]
        zero: a b
        """,
    )
    expect(
        typed(lambda x: x.expand(3, -1, -1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [c:3, a:5, b:4]
        zero: a b
        """,
    )


def test_copies_of_kv_heads_are_query_heads() -> None:
    """GQA by expand and reshape: the heads of k times the copies are the heads of q."""

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k[:, :, None].expand(2, 3, 5, 7, 4).reshape(2, 15, 7, 4)
        return q @ k.transpose(-1, -2)

    expect(
        typed(scores, q=(2, 15, 6, 4), k=(2, 3, 7, 4)),
        """
        q [a:2, b:3 * c:5, d:6, e:4]
        k [a:2, b:3, f:7, e:4]
        -> [a:2, b:3 * c:5, d:6, f:7]
        zero: a b c d f
        """,
    )


def test_repeated_kv_heads_are_query_heads_too() -> None:
    expect(
        typed(lambda q, k: q * k.repeat_interleave(5, dim=1), q=(2, 15, 4), k=(2, 3, 4)),
        """
        q [a:2, b:3 * c:5, d:4]
        k [a:2, b:3, d:4]
        -> [a:2, b:3 * c:5, d:4]
        zero: a b c d
        """,
    )


def test_expand_as_has_the_dims_of_the_other() -> None:
    expect(
        typed(lambda x, y: x.expand_as(y), x=(5, 1), y=(3, 5, 4)),
        """
        x [a:5, 1]
        y [b:3, a:5, c:4]
        -> [b:3, a:5, c:4]
        zero: a
        """,
    )


def test_broadcast_tensors() -> None:
    expect(
        typed(lambda x, y: torch.broadcast_tensors(x, y), x=(5, 1), y=(4,)),
        """
        x [a:5, 1]
        y [b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        """,
    )


def test_meshgrid_has_an_axis_per_tensor() -> None:
    expect(
        typed(lambda x, y: torch.meshgrid(x, y, indexing="ij"), x=(5,), y=(4,)),
        """
        x [a:5]
        y [b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        """,
    )
    expect(
        typed(lambda x, y: torch.meshgrid(x, y, indexing="xy"), x=(5,), y=(4,)),
        """
        x [a:5]
        y [b:4]
        -> [b:4, a:5]
        -> [b:4, a:5]
        """,
    )


def test_repeat_lays_copies_end_to_end() -> None:
    expect(
        typed(lambda x: x.repeat(2, 1, 3), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [c:2, a:5, d:3 * b:4]
        zero: a b
        """,
    )


def test_repeat_interleave_lays_copies_side_by_side() -> None:
    expect(
        typed(lambda x: x.repeat_interleave(3, dim=-1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4 * c:3]
        zero: a b
        """,
    )
    expect(
        typed(lambda x: x.repeat_interleave(3), x=(4,)),
        """
        x [a:4]
        -> [a:4 * b:3]
        zero: a
        """,
    )


def test_a_stated_number_of_copies_follows_what_is_repeated() -> None:
    expect(
        typed(lambda x: x.repeat_interleave(3, dim=-1, output_size=12), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4 * c:3]
        zero: a b
        """,
    )


class Copies(nn.Module):
    """Reads three copies of each channel, and says how many that makes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 10)
        self.outer = nn.Linear(30, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).repeat_interleave(3, dim=-1, output_size=self.outer.in_features))


def test_the_stated_number_follows_when_channels_go() -> None:
    copies = trace(Copies())
    (channels,) = copies.able("ffn")
    plan = copies.without({channels: units(channels, 0.5)})
    assert copies.report(copies.graph(plan), plan).sound


def test_repeat_interleave_of_a_flattened_tensor_is_not_followed() -> None:
    expect(
        typed(lambda x: x.repeat_interleave(3), x=(5, 4)),
        """
        x [a!:5, b!:4]
        -> [c!:60]
        a b c: repeat_interleave of a flattened tensor at %repeat_interleave_self_int = aten.repeat_interleave.self_int
        """,
    )


def test_copies_counted_by_an_axis_that_is_there_already_are_not_zero() -> None:
    """What is laid out along rows and along columns is zero in the removed rows alone."""
    expect(
        typed(lambda x: x.unsqueeze(1).expand(5, 5) * x, x=(5,)),
        """
        x [a:5]
        -> [a:5, a:5]
        """,
    )
    expect(
        typed(lambda x, y: x.repeat(5).view(5, 5) + y.unsqueeze(-1) * x, x=(5,), y=(5,)),
        """
        x [a:5]
        y [b:5]
        -> [b:5, a:5]
        zero: a
        """,
    )
