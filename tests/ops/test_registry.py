"""What has no rule, or a form that its rule does not follow, freezes all that it touches, and says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shear_passes.ops.registry import entry_of, rule
from tests.golden import expect
from tests.ops.typed import typed

aten = torch.ops.aten


def test_an_operator_without_a_rule_is_a_barrier() -> None:
    expect(
        typed(lambda x, y: torch.linalg.matrix_power(x, 3) @ y, x=(4, 4), y=(4, 5)),
        """
        x [a!:4, b!:4]
        y [c!:4, d:5]
        -> [e!:4, d:5]
        zero: d
        a b c e: no axis rule for aten.linalg_matrix_power at %linalg_matrix_power_default = aten.linalg_matrix_power
        """,
    )
    expect(
        typed(lambda x: torch.renorm(x, 2, 0, 1.0), x=(5, 4)),
        """
        x [a!:5, b!:4]
        -> [c!:5, d!:4]
        a b c d: no axis rule for aten.renorm at %renorm_default = aten.renorm
        """,
    )


def test_a_barrier_holds_what_is_bound_to_what_it_reads() -> None:
    """Also what was equated with it before, and what will be."""

    def call(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        early = x + y
        return (torch.linalg.pinv(x) * 1).mT + z + early

    expect(
        typed(call, x=(5, 4), y=(4,), z=(5, 1)),
        """
        x [a!:5, b!:4]
        y [b!:4]
        z [a!:5, 1]
        -> [a!:5, b!:4]
        a b: no axis rule for aten.linalg_pinv.atol_rtol_tensor at %linalg_pinv_atol_rtol_tensor = aten.linalg_pinv.atol_rtol_tensor
        """,
    )


def test_reading_a_value_into_python_holds_its_axes() -> None:
    expect(
        typed(lambda x: x * (x.sum().item() + 1), x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


def test_a_size_read_by_the_model_says_nothing() -> None:
    """The number is a constant of the graph: the model goes on dividing by what it was trained with."""
    expect(
        typed(lambda x: x / x.shape[-1] ** 0.5, x=(5, 4)),
        """
        x [a:5, b:4]
        -> [a:5, b:4]
        zero: a b
        """,
    )


def test_a_region_without_gradient_lies_open() -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            inner = torch.cat([x, x], -1)
        return inner * y

    expect(
        typed(call, x=(5, 4), y=(8,)),
        """
        x [a:5, b:4]
        y [(b:4 | b:4)]
        -> [a:5, (b:4 | b:4)]
        zero: a b
        """,
    )


def test_a_region_of_another_precision_lies_open() -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            inner = x.float() * y
        return inner.sum(-1)

    expect(
        typed(call, x=(5, 4), y=(4,)),
        """
        x [a:5, b:4]
        y [b:4]
        -> [a:5]
        zero: a
        """,
    )


def test_a_branch_on_data_is_a_barrier() -> None:
    def call(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))

    expect(
        typed(call, x=(5, 4), rounds=0),
        """
        x [a!:5, b!:4]
        -> [c!:5, d!:4]
        a b c d: no axis rule for cond at %cond = cond
        """,
    )


def test_two_rules_for_one_operator_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two rules for aten\.linear\.default"):
        rule(aten.linear.default)(lambda site: ())


def test_an_operator_is_found_by_name_before_its_library_is_imported() -> None:
    import transformers.integrations.moe  # noqa: F401

    assert entry_of(torch.ops.transformers.grouped_mm_fallback.default) == entry_of(aten._grouped_mm.default)
