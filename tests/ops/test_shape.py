"""Views, transposes and copies: the same elements in the same order, or in one that the rule says."""

from __future__ import annotations

import torch

from tests.golden import expect
from tests.ops.typed import typed


def test_a_view_makes_a_product_of_an_axis() -> None:
    expect(
        typed(lambda x: x.view(5, 3, 4), x=(5, 12)),
        """
        x [a:5, b:3 * c:4]
        -> [a:5, b:3, c:4]
        zero: a b c
        """,
    )


def test_a_view_lays_factors_together() -> None:
    expect(
        typed(lambda x: x.reshape(5, -1), x=(5, 3, 4)),
        """
        x [a:5, b:3, c:4]
        -> [a:5, b:3 * c:4]
        zero: a b c
        """,
    )


def test_a_view_aligns_factors_from_the_inside() -> None:
    expect(
        typed(lambda x: x.reshape(3, 8), x=(6, 4)),
        """
        x [a:3 * b:2, c:4]
        -> [a:3, b:2 * c:4]
        zero: a b c
        """,
    )


def test_a_view_whose_factors_do_not_align_holds_them() -> None:
    expect(
        typed(lambda x: x.reshape(4, 9), x=(6, 6)),
        """
        x [a!:6, b!:6]
        -> [c!:4, d!:9]
        a b c d: sizes do not align: 6 * 6 = 4 * 9 at %reshape_default = aten.reshape
        """,
    )


def test_leading_dims_stay_as_they_are() -> None:
    expect(
        typed(lambda x: x.view(2, 6, 3, 4), x=(2, 6, 12)),
        """
        x [a:2, b:6, c:3 * d:4]
        -> [a:2, b:6, c:3, d:4]
        zero: a b c d
        """,
    )


def test_flatten_and_unflatten() -> None:
    expect(
        typed(lambda x: (x.flatten(1), x.unflatten(-1, (2, 3)), x.ravel()), x=(5, 4, 6)),
        """
        x [a:5, b:4, c:2 * d:3]
        -> [a:5, b:4 * c:2 * d:3]
        -> [a:5, b:4, c:2, d:3]
        -> [a:5 * b:4 * c:2 * d:3]
        zero: a b c d, a b c d, a b c d
        """,
    )


def test_a_view_as_another_tensor_has_its_dims() -> None:
    """The sizes are those of the other tensor after pruning too."""
    expect(
        typed(lambda x, y: x.view_as(y), x=(5, 12), y=(5, 3, 4)),
        """
        x [a:5, b:3 * c:4]
        y [a:5, b:3, c:4]
        -> [a:5, b:3, c:4]
        zero: a b c
        """,
    )
    expect(
        typed(lambda x, y: x.reshape_as(y), x=(5, 12), y=(15, 4)),
        """
        x [a:5, b:3 * c:4]
        y [a:5 * b:3, c:4]
        -> [a:5 * b:3, c:4]
        zero: a b c
        """,
    )


def test_transposes() -> None:
    expect(
        typed(lambda x: (x.transpose(1, -1), x.mT, x.swapdims(0, 1), x.permute(2, 0, 1)), x=(5, 4, 3)),
        """
        x [a:5, b:4, c:3]
        -> [a:5, c:3, b:4]
        -> [a:5, c:3, b:4]
        -> [b:4, a:5, c:3]
        -> [c:3, a:5, b:4]
        zero: a b c, a b c, a b c, a b c
        """,
    )


def test_a_reversed_shape_reverses_all_dims() -> None:
    """With three dims of one size only the axes tell that it is not the last two that change places."""
    expect(
        typed(lambda x: torch.ops.aten.numpy_T(x), x=(4, 4, 4)),
        """
        x [a:4, b:4, c:4]
        -> [c:4, b:4, a:4]
        zero: a b c
        """,
    )


def test_dims_move() -> None:
    expect(
        typed(lambda x: (x.movedim(0, -1), x.movedim((0, 1), (2, 0)), x.moveaxis(2, 0)), x=(5, 4, 3)),
        """
        x [a:5, b:4, c:3]
        -> [b:4, c:3, a:5]
        -> [b:4, c:3, a:5]
        -> [c:3, a:5, b:4]
        zero: a b c, a b c, a b c
        """,
    )


def test_dims_of_size_one_come_and_go() -> None:
    expect(
        typed(
            lambda x: (x.unsqueeze(1), x[None, ..., None], x.unsqueeze(0).squeeze(0), x[:, None].squeeze()), x=(5, 4)
        ),
        """
        x [a:5, b:4]
        -> [a:5, 1, b:4]
        -> [1, a:5, b:4, 1]
        -> [a:5, b:4]
        -> [a:5, b:4]
        zero: a b, a b, a b, a b
        """,
    )


def test_another_dtype_is_the_same_tensor() -> None:
    expect(
        typed(lambda x: (x.double(), x.contiguous(), x.detach(), x.clone(), torch.dropout(x, 0.5, False)), x=(5, 4)),
        """
            x [a:5, b:4]
            -> [a:5, b:4]
            -> [a:5, b:4]
            -> [a:5, b:4]
            -> [a:5, b:4]
            -> [a:5, b:4]
            zero: a b, a b, a b, a b, a b
            """,
    )


def test_complex_numbers_are_pairs() -> None:
    expect(
        typed(
            lambda x, f: torch.view_as_real(torch.view_as_complex(x.view(5, 4, 2)) * torch.polar(f.exp(), f)).flatten(
                1
            ),
            x=(5, 8),
            f=(4,),
        ),
        """
        x [a:5, b:4 * (1 | 1)]
        f [b:4]
        -> [a:5, b:4 * (1 | 1)]
        zero: a b
        """,
    )


def test_a_diagonal_holds_rows_and_columns() -> None:
    expect(
        typed(lambda x: x.diagonal(dim1=0, dim2=2), x=(5, 4, 3)),
        """
        x [a!:5, b:4, c!:3]
        -> [b:4, d!:3]
        a c d: rows and columns are compared by number at %diagonal_default = aten.diagonal
        """,
    )


def test_a_copy_in_place_broadcasts() -> None:
    expect(
        typed(lambda x, y: x.clone().copy_(y), x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5, b:4]
        zero: b
        """,
    )


def test_what_a_view_writes_to_is_no_longer_zero() -> None:
    def fill(x: torch.Tensor) -> torch.Tensor:
        whole = x.clone()
        whole.view(5, 2, 6)[:, 0].add_(1.0)
        return whole

    expect(
        typed(fill, x=(5, 12)),
        """
        x [a:5, (1 | 1) * b:6]
        -> [a:5, (1 | 1) * b:6]
        """,
    )


def test_what_is_not_written_to_stays_zero() -> None:
    """Only the sum is changed in place, not what it was made from."""

    def add(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.tanh(x)
        total = made * 2
        total += 1
        return total, made

    expect(
        typed(add, x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        -> [a:5, b:4]
        zero: -, a b
        """,
    )


def test_what_was_read_before_a_write_was_zero() -> None:
    def add(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = x.clone()
        before = whole * 2
        whole[:, :3].add_(1.0)
        return before, whole * 2

    expect(
        typed(add, x=(5, 7)),
        """
        x [a:5, (b:3 | c:4)]
        -> [a:5, (b:3 | c:4)]
        -> [a:5, (b:3 | c:4)]
        zero: a b c, c
        """,
    )


def test_a_view_taken_before_a_write_sees_it() -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        whole = x.clone()
        view = whole.T
        whole.add_(1.0)
        return view * 2

    expect(
        typed(add, x=(5, 7)),
        """
        x [a:5, b:7]
        -> [b:7, a:5]
        """,
    )


def test_a_write_of_zeros_keeps_zeros() -> None:
    def scale(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        whole = x.clone()
        whole[:, :3] *= y
        return whole

    expect(
        typed(scale, x=(5, 7), y=(3,)),
        """
        x [a:5, (b:3 | c:4)]
        y [b:3]
        -> [a:5, (b:3 | c:4)]
        zero: a b c
        """,
    )


def test_a_tensor_set_to_itself_is_itself_and_to_another_a_barrier() -> None:
    def swapped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.set_.source_Tensor(x, y)  # type: ignore[no-any-return]  # operators are untyped

    expect(
        typed(lambda x: swapped(x, x), x=(3, 5)),
        """
        x [a:3, b:5]
        -> [a:3, b:5]
        zero: a b
        """,
    )
    expect(
        typed(lambda x, y: swapped(x.clone(), y), x=(3, 5), y=(3, 5)),
        """
        x [a!:3, b!:5]
        y [c!:3, d!:5]
        -> [e!:3, f!:5]
        a b c d e f: a tensor takes the memory of another at %set__source_tensor = aten.set_.source_Tensor
        """,
    )
