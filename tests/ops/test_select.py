"""Parts of a dim and parts put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_a_slice_is_a_part_of_a_concat() -> None:
    expect(
        typed(lambda x: x[:, 2:5], x=(4, 9)),
        """
        x [a:4, (b:2 | c:3 | d:4)]
        -> [a:4, c:3]
        zero: a c
        """,
    )


@pytest.mark.parametrize("whole", [slice(None), slice(0, 100), slice(-9, None), slice(-100, 100)])
def test_a_slice_of_everything_is_the_dim_itself(whole: slice) -> None:
    expect(
        typed(lambda x: x[:, whole], x=(4, 9)),
        """
        x [a:4, b:9]
        -> [a:4, b:9]
        zero: a b
        """,
    )


@pytest.mark.parametrize("bounds", [slice(-100, 3), slice(-9, -6), slice(0, 3), slice(None, 3)])
def test_a_slice_may_start_before_the_first_index(bounds: slice) -> None:
    expect(
        typed(lambda x: x[:, bounds], x=(4, 9)),
        """
        x [a:4, (b:3 | c:6)]
        -> [a:4, b:3]
        zero: a b
        """,
    )


def test_an_empty_slice_has_no_axis() -> None:
    expect(
        typed(lambda x: torch.cat([x[:, 9:], x[:, 5:5], x], -1), x=(4, 9)),
        """
        x [a:4, (b:5 | c:4)]
        -> [a:4, (b:5 | c:4)]
        zero: a b c
        """,
    )


def test_a_step_takes_the_outer_factor() -> None:
    """Even and odd places of rotary pairs lose the same indices."""
    expect(
        typed(lambda x: (x[..., ::2], x[..., 1::2]), x=(5, 8)),
        """
        x [a:5, b:4 * (1 | 1)]
        -> [a:5, b:4]
        -> [a:5, b:4]
        zero: a b, a b
        """,
    )


def test_a_step_that_does_not_fill_the_dim_holds_it() -> None:
    expect(
        typed(lambda x: (x[..., ::2], x[..., 2::4]), x=(5, 9)),
        """
        x [a:5, b!:9]
        -> [a:5, c!:5]
        -> [a:5, d!:2]
        zero: a, a
        b c: a slice across the structure of the axis at %slice_tensor = aten.slice.Tensor
        d: a slice across the structure of the axis at %slice_tensor_1 = aten.slice.Tensor
        """,
    )


def test_a_slice_across_heads_holds_them() -> None:
    expect(
        typed(lambda x: x.flatten(1)[:, 1:5], x=(5, 3, 4)),
        """
        x [a:5, b!:3, c!:4]
        -> [a:5, d!:4]
        zero: a
        b c d: a slice across the structure of the axis at %slice_tensor = aten.slice.Tensor
        """,
    )


def test_narrow() -> None:
    expect(
        typed(lambda x: (x.narrow(1, 2, 3), x.narrow(1, -3, 3)), x=(4, 9)),
        """
        x [a:4, (b:2 | c:3 | 1 | d:3)]
        -> [a:4, c:3]
        -> [a:4, d:3]
        zero: a c, a d
        """,
    )


def test_one_index_stays_and_its_neighbours_can_go() -> None:
    expect(
        typed(lambda x: (x.select(1, 2), x[:, -1]), x=(4, 6)),
        """
        x [a:4, (b:2 | 1 | c:2 | 1)]
        -> [a:4]
        -> [a:4]
        zero: a, a
        """,
    )


def test_chunk_and_split_make_a_concat() -> None:
    expect(
        typed(lambda x: x.chunk(2, -1), x=(5, 8)),
        """
        x [a:5, (b:4 | c:4)]
        -> [a:5, b:4]
        -> [a:5, c:4]
        zero: a b, a c
        """,
    )
    expect(
        typed(lambda x: x.split(5, -1), x=(4, 12)),
        """
        x [a:4, (b:5 | c:5 | d:2)]
        -> [a:4, b:5]
        -> [a:4, c:5]
        -> [a:4, d:2]
        zero: a b, a c, a d
        """,
    )
    expect(
        typed(lambda x: x.split([2, 3, 7], dim=-1), x=(4, 12)),
        """
        x [a:4, (b:2 | c:3 | d:7)]
        -> [a:4, b:2]
        -> [a:4, c:3]
        -> [a:4, d:7]
        zero: a b, a c, a d
        """,
    )
    expect(
        typed(lambda x: x.tensor_split((2, 5), -1), x=(4, 12)),
        """
        x [a:4, (b:2 | c:3 | d:7)]
        -> [a:4, b:2]
        -> [a:4, c:3]
        -> [a:4, d:7]
        zero: a b, a c, a d
        """,
    )


def test_unbind_holds_every_index() -> None:
    expect(
        typed(lambda x: x.unbind(1), x=(4, 3)),
        """
        x [a:4, (1 | 1 | 1)]
        -> [a:4]
        -> [a:4]
        -> [a:4]
        zero: a, a, a
        """,
    )


@pytest.mark.parametrize("put_together", [torch.cat, torch.concat, torch.concatenate])
def test_cat_is_a_concat(put_together: Any) -> None:
    expect(
        typed(lambda x, y, z: put_together([x, y, z], 1), x=(4, 3), y=(4, 5), z=(4, 2)),
        """
        x [a:4, b:3]
        y [a:4, c:5]
        z [a:4, d:2]
        -> [a:4, (b:3 | c:5 | d:2)]
        zero: a b c d
        """,
    )


def test_cat_of_one_tensor_with_itself_repeats_its_axis() -> None:
    expect(
        typed(lambda x: torch.cat([x, x], -1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, (b:4 | b:4)]
        zero: a b
        """,
    )


def test_cat_is_zero_only_where_every_part_is() -> None:
    expect(
        typed(lambda x, y: torch.cat([x, y.exp()], 1), x=(4, 3), y=(4, 5)),
        """
        x [a:4, b:3]
        y [a:4, c:5]
        -> [a:4, (b:3 | c:5)]
        zero: b
        """,
    )


def test_cat_of_nothing_but_empty_tensors() -> None:
    expect(
        typed(lambda x: torch.cat([x[:0], x[:0]]), x=(4,)),
        """
        x [a:4]
        -> [0]
        """,
    )


def test_cat_undoes_split() -> None:
    expect(
        typed(lambda x: torch.cat(x.split([2, 3, 7], -1), -1), x=(4, 12)),
        """
        x [a:4, (b:2 | c:3 | d:7)]
        -> [a:4, (b:2 | c:3 | d:7)]
        zero: a b c d
        """,
    )


def test_parts_in_another_order() -> None:
    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.split([2, 3, 7], -1)
        return torch.cat([c, a, b], -1)

    expect(
        typed(turned, x=(4, 12)),
        """
        x [a:4, (b:2 | c:3 | d:7)]
        -> [a:4, (d:7 | b:2 | c:3)]
        zero: a b c d
        """,
    )


def test_stack_counts_its_tensors() -> None:
    expect(
        typed(lambda x, y: torch.stack([x, y], 1), x=(4, 3), y=(4, 3)),
        """
        x [a:4, b:3]
        y [a:4, b:3]
        -> [a:4, (1 | 1), b:3]
        zero: a b
        """,
    )


def test_zeros_laid_beside_a_dim_are_held() -> None:
    expect(
        typed(lambda x: F.pad(x, (1, 2, 3, 0)), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [(c!:3 | a:5), (1 | b:4 | d!:2)]
        zero: a b
        c d: padding at %pad_default = aten.pad
        """,
    )


def test_padding_with_ones_makes_no_zeros() -> None:
    expect(
        typed(lambda x: F.pad(x, (0, 2), value=1.0), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, (b:4 | c!:2)]
        c: padding at %pad_default = aten.pad
        """,
    )


def test_padding_by_the_tensors_own_values_holds_it() -> None:
    expect(
        typed(lambda x: F.pad(x, (1, 2), mode="reflect"), x=(2, 5, 4)),
        """
        x [a:2, b:5, c!:4]
        -> [a:2, b:5, d!:7]
        c d: padding by the tensor's own values at %pad_default = aten.pad
        """,
    )


def test_negative_padding_holds_the_dim() -> None:
    expect(
        typed(lambda x: F.pad(x, (-1, 0)), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5, c!:3]
        zero: a
        b c: padding by the tensor's own values at %pad_default = aten.pad
        """,
    )


def test_roll_and_flip_hold_their_dims() -> None:
    expect(
        typed(lambda x: (x.roll(1, 1), x.flip(0)), x=(5, 4, 3)),
        """
        x [a!:5, b!:4, c:3]
        -> [a!:5, b!:4, c:3]
        -> [a!:5, b!:4, c:3]
        zero: a b c, a b c
        a: the axis is reversed at %flip_default = aten.flip
        b: the axis is rolled at %roll_default = aten.roll
        """,
    )
    expect(
        typed(lambda x: x.roll(1), x=(5, 4)),
        """
        x [a!:5, b!:4]
        -> [a!:5, b!:4]
        zero: a b
        a b: the axis is rolled at %roll_default = aten.roll
        """,
    )


def test_windows_hold_their_dim() -> None:
    expect(
        typed(lambda x: x.unfold(1, 3, 2), x=(5, 7)),
        """
        x [a:5, b!:7]
        -> [a:5, c!:3, d!:3]
        zero: a
        b c d: windows run along the axis at %unfold_default = aten.unfold
        """,
    )


def test_a_part_that_is_replaced_holds_its_dim() -> None:
    expect(
        typed(lambda x, y: x.slice_scatter(y, 1, 1, 3), x=(5, 4, 6), y=(5, 2, 6)),
        """
        x [a:5, b!:4, c:6]
        y [a:5, d!:2, c:6]
        -> [a:5, b!:4, c:6]
        b d: a part of the axis is replaced at %slice_scatter_default = aten.slice_scatter
        """,
    )
    expect(
        typed(lambda x, y: x.select_scatter(y, 1, 2), x=(5, 4, 6), y=(5, 6)),
        """
        x [a:5, b!:4, c:6]
        y [a:5, c:6]
        -> [a:5, b!:4, c:6]
        b: a part of the axis is replaced at %select_scatter_default = aten.select_scatter
        """,
    )


def test_rotary_halves_are_pairs() -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    expect(
        typed(rotate, x=(5, 8), cos=(4,), sin=(4,)),
        """
        x   [a:5, (b:4 | b:4)]
        cos [b:4]
        sin [b:4]
        ->  [a:5, (b:4 | b:4)]
        zero: a b
        """,
    )


def test_partial_rotary_leaves_the_rest_alone() -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        turned, passed = x[..., :6], x[..., 6:]
        left, right = turned[..., :3], turned[..., 3:]
        return torch.cat([turned * torch.cat([cos, cos], -1) + torch.cat([-right, left], -1), passed], -1)

    expect(
        typed(rotate, x=(5, 10), cos=(3,)),
        """
        x   [a:5, (b:3 | b:3 | c:4)]
        cos [b:3]
        ->  [a:5, (b:3 | b:3 | c:4)]
        zero: a b c
        """,
    )


def test_interleaved_rotary_pairs_neighbours() -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return x * cos.repeat_interleave(2, -1) + turned

    expect(
        typed(rotate, x=(5, 8), cos=(4,)),
        """
        x   [a:5, b:4 * (1 | 1)]
        cos [b:4]
        ->  [a:5, b:4 * (1 | 1)]
        zero: a b
        """,
    )
