"""Normalisation: what a statistic runs over is held; ``~`` marks what a rewrite of the norm can lift."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.golden import expect
from tests.ops.typed import typed


def test_layer_norm_holds_what_it_centres() -> None:
    expect(
        typed(lambda x, w, b: F.layer_norm(x, (4,), w, b), x=(5, 4), w=(4,), b=(4,)),
        """
        x [a:5, b!:4]
        w [b!:4]
        b [b!:4]
        -> [a:5, b!:4]
        b: layer normalisation runs over the axis and centres it, which no rescaling can mend at %layer_norm_default = aten.layer_norm
        """,
    )


def test_layer_norm_over_two_dims() -> None:
    expect(
        typed(lambda x, w: F.layer_norm(x, (4, 3), w), x=(5, 4, 3), w=(4, 3)),
        """
        x [a:5, b!:4, c!:3]
        w [b!:4, c!:3]
        -> [a:5, b!:4, c!:3]
        b c: layer normalisation runs over the axis and centres it, which no rescaling can mend at %layer_norm_default = aten.layer_norm
        """,
    )


def test_rms_norm_can_be_rescaled() -> None:
    expect(
        typed(lambda x, w: F.rms_norm(x, (4,), w), x=(5, 4), w=(4,)),
        """
        x [a:5, b~:4]
        w [b~:4]
        -> [a:5, b~:4]
        zero: a b
        b: a mean (RMS normalisation) runs over the axis at %rms_norm_default = aten.rms_norm
        """,
    )


def test_rms_norm_by_hand_is_the_same() -> None:
    expect(
        typed(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), x=(5, 4), w=(4,)),
        """
        x [a:5, b~:4]
        w [b~:4]
        -> [a:5, b~:4]
        zero: a b
        b: a mean (RMS normalisation) runs over the axis at %mean_dim = aten.mean.dim
        """,
    )


def test_rms_norm_of_what_is_not_zero_there_cannot() -> None:
    expect(
        typed(lambda x, w: F.rms_norm(x.cos(), (4,), w), x=(5, 4), w=(4,)),
        """
        x [a:5, b!:4]
        w [b!:4]
        -> [a:5, b!:4]
        b: summed over where removed entries need not be zero at %rms_norm_default = aten.rms_norm
        """,
    )


def test_group_norm_can_lose_groups() -> None:
    expect(
        typed(lambda x, w, b: F.group_norm(x, 3, w, b), x=(2, 12, 5), w=(12,), b=(12,)),
        """
        x [a:2, b:3 * c!:4, d!:5]
        w [b:3 * c!:4]
        b [b:3 * c!:4]
        -> [a:2, b:3 * c!:4, d!:5]
        zero: b c
        c: group normalisation runs over the channels of a group at %group_norm_default = aten.group_norm
        d: group normalisation runs over the positions at %group_norm_default = aten.group_norm
        """,
    )


def test_group_norm_without_bias_is_zero_where_its_input_is() -> None:
    expect(
        typed(lambda x: F.group_norm(x, 3), x=(2, 12, 5)),
        """
        x [a:2, b:3 * c!:4, d!:5]
        -> [a:2, b:3 * c!:4, d!:5]
        zero: a b c d
        c: group normalisation runs over the channels of a group at %group_norm_default = aten.group_norm
        d: group normalisation runs over the positions at %group_norm_default = aten.group_norm
        """,
    )


def test_a_bias_that_is_not_zero_there_makes_no_zeros() -> None:
    expect(
        typed(lambda x, w, b: F.group_norm(x, 3, w, b.cos()), x=(2, 12, 5), w=(12,), b=(12,)),
        """
        x [a:2, b:3 * c!:4, d!:5]
        w [b:3 * c!:4]
        b [b:3 * c!:4]
        -> [a:2, b:3 * c!:4, d!:5]
        c: group normalisation runs over the channels of a group at %group_norm_default = aten.group_norm
        d: group normalisation runs over the positions at %group_norm_default = aten.group_norm
        """,
    )


def test_a_group_per_channel_can_lose_channels() -> None:
    expect(
        typed(lambda x, w, b: F.group_norm(x, 4, w, b), x=(2, 4, 5), w=(4,), b=(4,)),
        """
        x [a:2, b:4, c!:5]
        w [b:4]
        b [b:4]
        -> [a:2, b:4, c!:5]
        zero: b
        c: group normalisation runs over the positions at %group_norm_default = aten.group_norm
        """,
    )


def test_batch_norm_follows_its_channels() -> None:
    expect(
        typed(
            lambda x, w, b, mean, var: F.batch_norm(x, mean, var.abs(), w, b),
            x=(2, 4, 5),
            w=(4,),
            b=(4,),
            mean=(4,),
            var=(4,),
        ),
        """
        x    [a:2, b:4, c:5]
        w    [b:4]
        b    [b:4]
        mean [b:4]
        var  [b:4]
        ->   [a:2, b:4, c:5]
        zero: b
        """,
    )


def test_batch_norm_without_weights_makes_no_zeros() -> None:
    expect(
        typed(lambda x, mean, var: F.batch_norm(x, mean, var.abs()), x=(2, 4, 5), mean=(4,), var=(4,)),
        """
        x    [a:2, b:4, c:5]
        mean [b:4]
        var  [b:4]
        ->   [a:2, b:4, c:5]
        """,
    )


def test_batch_norm_without_running_statistics_holds_batch_and_positions() -> None:
    expect(
        typed(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), x=(2, 4, 5), w=(4,), b=(4,)),
        """
        x [a!:2, b:4, c!:5]
        w [b:4]
        b [b:4]
        -> [a!:2, b:4, c!:5]
        zero: b
        a c: statistics are taken over the axis at %batch_norm_default = aten.batch_norm
        """,
    )


def test_instance_norm_holds_positions() -> None:
    expect(
        typed(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), x=(2, 4, 5), w=(4,), b=(4,)),
        """
        x [a!:2, b:4, c!:5]
        w [b:4]
        b [b:4]
        -> [a!:2, b:4, c!:5]
        zero: b
        a c: statistics are taken over the axis at %instance_norm_default = aten.instance_norm
        """,
    )


def test_softmax_holds_what_shares_its_sum() -> None:
    expect(
        typed(lambda x: (x.softmax(-1), x.log_softmax(0)), x=(5, 4, 3)),
        """
        x [a!:5, b:4, c!:3]
        -> [a!:5, b:4, c!:3]
        -> [a!:5, b:4, c!:3]
        a: softmax runs over the axis at %log_softmax_int = aten.log_softmax.int
        c: softmax runs over the axis at %softmax_int = aten.softmax.int
        """,
    )


def test_a_unit_vector_without_an_eps_cannot_be_all_zero() -> None:
    """Of a removed row the norm is zero, and the quotient not a number; an eps mends that."""
    expect(
        typed(lambda x: x / x.norm(dim=-1, keepdim=True), x=(5, 4)),
        """
        x [a!:5, b:4]
        -> [a!:5, b:4]
        zero: a b
        a: removed entries would be divided by at %div_tensor = aten.div.Tensor
        """,
    )
    expect(
        typed(lambda x: F.normalize(x, dim=-1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )
