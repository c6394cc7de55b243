"""Candidates are tried out, and a wrong one may ask for anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shear_backends.module.judge import _failure
from shear_ir.frontend.inputs import as_inputs


class Attend(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        made: Tensor = scaled_dot_product_attention(q, q[:, :2], q[:, : self.heads], enable_gqa=True)
        return made


def test_attention_over_no_heads_is_refused_before_a_kernel_divides_by_them() -> None:
    feed = as_inputs(Attend(2), torch.randn(2, 5, 8))
    assert _failure(Attend(2), feed) == ""
    assert _failure(Attend(0), feed) == "ShearingError: attention over a tensor of shape [2, 0, 5, 2]"
