"""Convolutions: channels are axes, groups are a factor of them, positions and kernels are held."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_a_convolution_is_a_linear_map_of_channels() -> None:
    expect(
        typed(lambda x, w, b: F.conv1d(x, w, b), x=(2, 4, 9), w=(6, 4, 3), b=(6,)),
        """
        x [a:2, b:4, c!:9]
        w [d:6, b:4, e!:3]
        b [d:6]
        -> [a:2, d:6, f!:7]
        zero: d
        c f: positions of a convolution at %conv1d_default = aten.conv1d
        e: kernel positions at %conv1d_default = aten.conv1d
        """,
    )


def test_a_convolution_without_a_batch() -> None:
    expect(
        typed(lambda x, w: F.conv2d(x, w, padding="same"), x=(4, 9, 7), w=(6, 4, 3, 5)),
        """
        x [a:4, b!:9, c!:7]
        w [d:6, a:4, e!:3, f!:5]
        -> [d:6, g!:9, h!:7]
        zero: d
        b c g h: positions of a convolution at %conv2d_padding = aten.conv2d.padding
        e f: kernel positions at %conv2d_padding = aten.conv2d.padding
        """,
    )


def test_groups_are_the_outer_factor_of_the_channels() -> None:
    expect(
        typed(lambda x, w, b: F.conv1d(x, w, b, groups=2), x=(2, 8, 9), w=(6, 4, 3), b=(6,)),
        """
        x [a:2, b:2 * c:4, d!:9]
        w [b:2 * e:3, c:4, f!:3]
        b [b:2 * e:3]
        -> [a:2, b:2 * e:3, g!:7]
        zero: b e
        d g: positions of a convolution at %conv1d_default = aten.conv1d
        f: kernel positions at %conv1d_default = aten.conv1d
        """,
    )


def test_depthwise_channels_stay_themselves() -> None:
    expect(
        typed(lambda x, w, b: F.conv1d(x, w, b, groups=4), x=(2, 4, 9), w=(4, 1, 3), b=(4,)),
        """
        x [a:2, b:4, c!:9]
        w [b:4, 1, d!:3]
        b [b:4]
        -> [a:2, b:4, e!:7]
        zero: b
        c e: positions of a convolution at %conv1d_default = aten.conv1d
        d: kernel positions at %conv1d_default = aten.conv1d
        """,
    )


def test_depthwise_channels_with_a_multiplier() -> None:
    expect(
        typed(lambda x, w: F.conv1d(x, w, groups=4), x=(2, 4, 9), w=(12, 1, 3)),
        """
        x [a:2, b:4, c!:9]
        w [b:4 * d:3, 1, e!:3]
        -> [a:2, b:4 * d:3, f!:7]
        zero: a b d
        c f: positions of a convolution at %conv1d_default = aten.conv1d
        e: kernel positions at %conv1d_default = aten.conv1d
        """,
    )


def test_a_bias_that_is_not_zero_there_makes_no_zeros() -> None:
    expect(
        typed(lambda x, w, b: F.conv1d(x, w, b.cos()), x=(2, 4, 9), w=(6, 4, 3), b=(6,)),
        """
        x [a:2, b:4, c!:9]
        w [d:6, b:4, e!:3]
        b [d:6]
        -> [a:2, d:6, f!:7]
        c f: positions of a convolution at %conv1d_default = aten.conv1d
        e: kernel positions at %conv1d_default = aten.conv1d
        """,
    )


def test_a_transposed_convolution_has_its_channels_the_other_way_round() -> None:
    expect(
        typed(lambda x, w, b: F.conv_transpose2d(x, w, b), x=(2, 4, 5, 7), w=(4, 6, 3, 3), b=(6,)),
        """
        x [a:2, b:4, c!:5, d!:7]
        w [b:4, e:6, f!:3, g!:3]
        b [e:6]
        -> [a:2, e:6, h!:7, i!:9]
        zero: e
        c d h i: positions of a convolution at %conv_transpose2d_input = aten.conv_transpose2d.input
        f g: kernel positions at %conv_transpose2d_input = aten.conv_transpose2d.input
        """,
    )


def test_a_transposed_convolution_in_groups() -> None:
    expect(
        typed(lambda x, w: F.conv_transpose1d(x, w, groups=2), x=(2, 8, 9), w=(8, 3, 3)),
        """
        x [a:2, b:2 * c:4, d!:9]
        w [b:2 * c:4, e:3, f!:3]
        -> [a:2, b:2 * e:3, g!:11]
        zero: a b e
        d g: positions of a convolution at %conv_transpose1d_default = aten.conv_transpose1d
        f: kernel positions at %conv_transpose1d_default = aten.conv_transpose1d
        """,
    )


def test_the_general_form() -> None:
    call = torch.ops.aten.convolution.default
    expect(
        typed(lambda x, w: call(x, w, None, [1], [0], [1], False, [0], 2), x=(2, 8, 9), w=(6, 4, 3)),
        """
        x [a:2, b:2 * c:4, d!:9]
        w [b:2 * e:3, c:4, f!:3]
        -> [a:2, b:2 * e:3, g!:7]
        zero: a b e
        d g: positions of a convolution at %convolution_default = aten.convolution
        f: kernel positions at %convolution_default = aten.convolution
        """,
    )


def test_pooling_and_resizing_keep_channels() -> None:
    expect(
        typed(
            lambda x: (
                F.max_pool2d(x, 2),
                F.avg_pool2d(x, 3),
                F.adaptive_avg_pool2d(x, 1),
                F.interpolate(x, size=(4, 5)),
            ),
            x=(2, 4, 9, 7),
        ),
        """
        x [a:2, b:4, c!:9, d!:7]
        -> [a:2, b:4, e!:4, f!:3]
        -> [a:2, b:4, g!:3, h!:2]
        -> [a:2, b:4, 1, 1]
        -> [a:2, b:4, i!:4, j!:5]
        zero: a b, a b, a b, a b
        c d e f: positions of a pooling at %max_pool2d_default = aten.max_pool2d
        g h: positions of a pooling at %avg_pool2d_default = aten.avg_pool2d
        i j: positions of a pooling at %upsample_nearest2d_vec = aten.upsample_nearest2d.vec
        """,
    )


def test_the_largest_entry_and_its_place() -> None:
    expect(
        typed(lambda x: F.adaptive_max_pool1d(x, 3, return_indices=True), x=(2, 4, 9)),
        """
        x [a:2, b:4, c!:9]
        -> [a:2, b:4, d!:3]
        -> [a:2, b:4, d!:3]
        c d: positions of a pooling at %adaptive_max_pool1d_default = aten.adaptive_max_pool1d
        """,
    )


def test_channels_become_positions_and_back() -> None:
    expect(
        typed(lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2)), x=(2, 12, 4, 6)),
        """
        x [a:2, b:3 * c!:4, d!:4, e!:6]
        -> [a:2, b:3, f!:8, g!:12]
        -> [a:2, b:3 * c!:4 * h!:4, i!:2, j!:3]
        zero: a b, a b c
        c d e f g: channels become positions at %pixel_shuffle_default = aten.pixel_shuffle
        h i j: positions become channels at %pixel_unshuffle_default = aten.pixel_unshuffle
        """,
    )


def test_shuffled_channels_change_factors() -> None:
    expect(
        typed(lambda x: F.channel_shuffle(x, 2), x=(3, 8, 5, 7)),
        """
        x [a:3, b!:2 * c:4, d:5, e:7]
        -> [a:3, c:4 * b!:2, d:5, e:7]
        zero: a b c d e
        b: the number of groups is written in the call at %channel_shuffle_default = aten.channel_shuffle
        """,
    )


def test_windows_carry_their_channels() -> None:
    expect(
        typed(lambda x: F.unfold(x, (2, 3)), x=(2, 4, 5, 7)),
        """
        x [a:2, b:4, c!:5, d!:7]
        -> [a:2, b:4 * e!:6, f!:20]
        zero: a b
        c d e f: windows of positions at %im2col_default = aten.im2col
        """,
    )
    expect(
        typed(lambda x: F.fold(x, (5, 7), (2, 3)), x=(2, 24, 20)),
        """
        x [a:2, b:4 * c!:6, d!:20]
        -> [a:2, b:4, e!:5, f!:7]
        c d e f: windows of positions at %col2im_default = aten.col2im
        """,
    )


def test_positions_given_by_a_grid() -> None:
    expect(
        typed(lambda x, grid: F.grid_sample(x, grid), x=(2, 4, 5, 7), grid=(2, 3, 6, 2)),
        """
        x    [a:2, b:4, c!:5, d!:7]
        grid [a:2, e:3, f:6, g!:2]
        ->   [a:2, b:4, e:3, f:6]
        zero: a b
        c d g: positions are chosen by value at %grid_sampler_default = aten.grid_sampler
        """,
    )
