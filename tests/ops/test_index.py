"""Access by computed positions: what values choose is held, everything else passes through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shear_ir as sir
from tests.golden import expect
from tests.ops.typed import typed

PICK = torch.tensor([0, 2, 1])
TABLE = torch.tensor([[0, 1, 1], [2, 0, 3]])


def test_gather_walks_the_other_dims_together() -> None:
    expect(
        typed(lambda x, i: x.gather(1, i), x=(2, 4), i=TABLE),
        """
        x [a:2, b!:4]
        i [a:2, c:3]
        -> [a:2, c:3]
        zero: a
        b: indices of the axis are chosen by value at %gather_default = aten.gather
        """,
    )


def test_gather_of_a_part_of_another_dim_holds_it() -> None:
    expect(
        typed(lambda x, i: x.gather(1, i), x=(5, 4), i=TABLE),
        """
        x [a!:5, b!:4]
        i [c!:2, d:3]
        -> [c!:2, d:3]
        a c: only a part of the axis is gathered at %gather_default = aten.gather
        b: indices of the axis are chosen by value at %gather_default = aten.gather
        """,
    )


def test_take_along_dim() -> None:
    expect(
        typed(lambda x, i: x.take_along_dim(i, 1), x=(2, 4), i=TABLE),
        """
        x [a:2, b!:4]
        i [a:2, c:3]
        -> [a:2, c:3]
        zero: a
        b: indices of the axis are chosen by value at %take_along_dim_default = aten.take_along_dim
        """,
    )


def test_an_index_tensor_brings_its_dims() -> None:
    expect(
        typed(lambda x, i: x[:, i], x=(5, 4, 6), i=TABLE),
        """
        x [a:5, b!:4, c:6]
        i [d:2, e:3]
        -> [a:5, d:2, e:3, c:6]
        zero: a c
        b: indices of the axis are chosen by value at %index_tensor = aten.index.Tensor
        """,
    )


def test_index_tensors_broadcast() -> None:
    expect(
        typed(lambda x, i, j: x[i[:, None], j], x=(5, 4, 6), i=PICK, j=torch.tensor([3, 1])),
        """
        x [a!:5, b!:4, c:6]
        i [d:3]
        j [e:2]
        -> [d:3, e:2, c:6]
        zero: c
        a b: indices of the axis are chosen by value at %index_tensor = aten.index.Tensor
        """,
    )


def test_index_tensors_apart_come_first() -> None:
    expect(
        typed(lambda x, i: x[i, :, i], x=(5, 4, 6), i=PICK),
        """
        x [a!:5, b:4, c!:6]
        i [d:3]
        -> [d:3, b:4]
        zero: b
        a c: indices of the axis are chosen by value at %index_tensor = aten.index.Tensor
        """,
    )


def test_index_select() -> None:
    expect(
        typed(lambda x, i: x.index_select(-1, i), x=(5, 4), i=PICK),
        """
        x [a:5, b!:4]
        i [c:3]
        -> [a:5, c:3]
        zero: a
        b: indices of the axis are chosen by value at %index_select_default = aten.index_select
        """,
    )


def test_scatter_holds_where_values_say_where_to_write() -> None:
    expect(
        typed(lambda x, i, y: x.scatter(1, i, y), x=(2, 4), i=TABLE, y=(2, 3)),
        """
        x [a:2, b!:4]
        i [a:2, c!:3]
        y [a:2, d!:3]
        -> [a:2, b!:4]
        b c d: indices of the axis are chosen by value at %scatter_src = aten.scatter.src
        """,
    )
    expect(
        typed(lambda x, i: x.scatter(1, i, 1.0), x=(2, 4), i=TABLE),
        """
        x [a:2, b!:4]
        i [a:2, c!:3]
        -> [a:2, b!:4]
        b c: indices of the axis are chosen by value at %scatter_value = aten.scatter.value
        """,
    )
    expect(
        typed(lambda x, i, y: x.scatter_add(1, i, y), x=(2, 4), i=TABLE, y=(2, 3)),
        """
        x [a:2, b!:4]
        i [a:2, c!:3]
        y [a:2, d!:3]
        -> [a:2, b!:4]
        b c d: indices of the axis are chosen by value at %scatter_add_default = aten.scatter_add
        """,
    )


def test_index_add_holds_its_positions() -> None:
    expect(
        typed(lambda x, i, y: x.index_add(0, i, y), x=(5, 4), i=PICK, y=(3, 4)),
        """
        x [a!:5, b:4]
        i [c!:3]
        y [c!:3, b:4]
        -> [a!:5, b:4]
        a c: indices of the axis are chosen by value at %index_add_default = aten.index_add
        """,
    )


def test_index_copy_in_place() -> None:
    expect(
        typed(lambda x, i, y: x.clone().index_copy_(0, i, y), x=(5, 4), i=PICK, y=(3, 4)),
        """
        x [a!:5, b:4]
        i [c!:3]
        y [c!:3, b:4]
        -> [a!:5, b:4]
        a c: indices of the axis are chosen by value at %index_copy__default = aten.index_copy_
        """,
    )


def test_index_fill_holds_what_is_filled() -> None:
    expect(
        typed(lambda x, i: x.index_fill(0, i, 1.0), x=(5, 4), i=PICK),
        """
        x [a!:5, b:4]
        i [c!:3]
        -> [a!:5, b:4]
        a c: indices of the axis are chosen by value at %index_fill_int_scalar = aten.index_fill.int_Scalar
        """,
    )


def test_assignment_by_an_index_tensor() -> None:
    def assign(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[i] = y
        return x

    expect(
        typed(assign, x=(5, 4), i=PICK, y=(3, 4)),
        """
        x [a!:5, b:4]
        i [c!:3]
        y [c!:3, b:4]
        -> [a!:5, b:4]
        a: indices of the axis are chosen by value at %index_put__default = aten.index_put_
        c: entries are written one by one at %index_put__default = aten.index_put_
        """,
    )


def test_assignment_to_a_later_dim_holds_everything() -> None:
    def assign(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, i] = y
        return x

    expect(
        typed(assign, x=(5, 4), i=PICK, y=(5, 3)),
        """
        x [a!:5, b!:4]
        i [c!:3]
        y [d!:5, e!:3]
        -> [a!:5, b!:4]
        a b c d e: indices of the axis are chosen by value at %index_put__default = aten.index_put_
        """,
    )


def test_assignment_to_a_slice_is_a_copy_into_a_part() -> None:
    def assign(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1:3] = y
        return x

    expect(
        typed(assign, x=(5, 6), y=(5, 2)),
        """
        x [a:5, (1 | b:2 | c:3)]
        y [a:5, b:2]
        -> [a:5, (1 | b:2 | c:3)]
        zero: a b c
        """,
    )


def test_one_hot_counts_classes_by_value() -> None:
    expect(
        typed(lambda x, i: F.one_hot(i, 4).float() @ x, x=(4, 5), i=PICK),
        """
        x [a!:4, b:5]
        i [c:3]
        -> [c:3, b:5]
        zero: b
        a: classes are counted by value at %one_hot_default = aten.one_hot
        """,
    )


def test_the_largest_entries_and_their_places() -> None:
    expect(
        typed(lambda x: x.topk(2, -1), x=(5, 4)),
        """
        x [a:5, b!:4]
        -> [a:5, c!:2]
        -> [a:5, c!:2]
        zero: a, -
        b c: entries are ranked along the axis at %topk_default = aten.topk
        """,
    )


def test_experts_chosen_by_topk_are_one_axis_with_the_rows_of_their_router() -> None:
    def experts(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, chosen = F.linear(x, router).softmax(-1).topk(2, -1)
        inner = torch.einsum("si,skoi->sko", x, up[chosen])
        return torch.einsum("sko,skio,sk->si", inner.relu(), down[chosen], weights)

    expect(
        typed(experts, x=(3, 4), router=(5, 4), up=(5, 6, 4), down=(5, 4, 6)),
        """
        x      [a:3, b:4]
        router [c:5, b:4]
        up     [c:5, d:6, b:4]
        down   [c:5, e:4, d:6]
        ->     [a:3, e:4]
        zero: a e
        """,
    )


def test_counting_and_sorting_by_value() -> None:
    expect(
        typed(lambda x: x.histc(3), x=(5, 4)),
        """
        x [a!:5, b!:4]
        -> [c!:3]
        a b c: entries are counted by value at %histc_default = aten.histc
        """,
    )
    expect(
        typed(lambda x, t: (torch.bucketize(x, t), torch.searchsorted(t, x)), x=(5, 4), t=torch.tensor([0.0, 1.0])),
        """
            x [a:5, b:4]
            t [c!:2]
            -> [a:5, b:4]
            -> [a:5, b:4]
            c: a table of boundaries at %bucketize_tensor = aten.bucketize.Tensor
            """,
    )


def test_a_triangle_compares_rows_and_columns() -> None:
    expect(
        typed(lambda x: x.tril(), x=(3, 5, 4)),
        """
        x [a:3, b!:5, c!:4]
        -> [a:3, b!:5, c!:4]
        b c: rows and columns are compared by number at %tril_default = aten.tril
        """,
    )


class Chosen(nn.Module):
    """A row of a table for each token; rows past ``most`` are none, and indices are kept up to ``high``."""

    def __init__(self, most: int, high: int) -> None:
        super().__init__()
        self.most, self.high = most, high
        self.router, self.table = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        ids = self.router(x).argmax(-1)
        return x.masked_fill((ids >= self.most)[..., None], 0.0) + self.table[ids.clamp(max=self.high)]


@pytest.mark.parametrize(("most", "high", "free"), [(6, 5, True), (7, 9, True), (5, 5, False), (6, 4, False)])
def test_bounds_that_every_index_keeps_hold_nothing(most: int, high: int, free: bool) -> None:
    model = Chosen(most, high).eval()
    program = sir.trace(model, torch.randn(5, 8))
    assert [g.prunable for g in sir.groups(program) if g.kind == "expert"] == [free]
    if free:
        plan = sir.plan(program, ratio=0.3, kinds=("expert",))
        assert sir.verify(model, sir.shear(model, plan, inputs=torch.randn(5, 8)), plan, inputs=torch.randn(5, 8)).sound
