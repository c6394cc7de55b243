"""Explanations as their readers see them."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_ir.errors import ShearError
from tests.analysis import explained
from tests.golden import expect

STATES = torch.zeros(2, 7, 10)
IDS = torch.zeros(2, 7, dtype=torch.long)


def explain(model: nn.Module, name: str, feed: Any = STATES) -> str:
    """The explanation as text; lines of code without their numbers, which move."""
    return re.sub(r"(\.py):\d+", r"\1", str(sir.explain(sir.trace(model, feed), name)))


def test_a_kv_head_takes_its_query_heads_along() -> None:
    expect(
        explain(explained.GroupedQueries(), "kv"),
        """
        kv: 3 kv_head units in 4 slices, prunable

        tied to @q.weight, dim 0 [kv:3 * q:2 * d0:4]:

        1. @k.weight, dim 0 [kv:3 * d0:4]
             @q.weight, dim 0
             = %q, dim 2            aten.linear                                                        explained.py: q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
             = %unflatten, dim 2    aten.unflatten
             = %transpose, dim 1    aten.transpose
             = %transpose_1, dim 1  aten.scaled_dot_product_attention (%scaled_dot_product_attention)  explained.py: y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
             = %unflatten_1, dim 2  aten.transpose                                                     explained.py: k = self.k(x).unflatten(-1, (3, 4)).transpose(1, 2)
             = %k, dim 2            aten.unflatten
             = @k.weight, dim 0     aten.linear

        2. @v.weight, dim 0 [kv:3 * d1:4]
             %transpose, dim 1
             = %transpose_2, dim 1  aten.scaled_dot_product_attention (%scaled_dot_product_attention)  explained.py: y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
             = %unflatten_2, dim 2  aten.transpose                                                     explained.py: v = self.v(x).unflatten(-1, (3, 4)).transpose(1, 2)
             = %v, dim 2            aten.unflatten
             = @v.weight, dim 0     aten.linear

        3. @o.weight, dim 1 [kv:3 * q:2 * d1:4]
             %transpose, dim 1
             = %scaled_dot_product_attention, dim 1  aten.scaled_dot_product_attention  explained.py: y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
             = %transpose_3, dim 2                   aten.transpose                     explained.py: return self.o(y.transpose(1, 2).flatten(-2))
             = %flatten, dim 2                       aten.flatten
             = @o.weight, dim 1                      aten.linear (%o)
        """,
    )


def test_a_parameters_dim_explains_each_axis_in_it() -> None:
    expect(
        explain(explained.Rotated(), "up.weight:0"),
        """
        ffn: 7 ffn units in 3 slices, prunable

        tied to @up.weight, dim 0, 1st ffn [(ffn:7 | ffn:7)]:

        1. @up.weight, dim 0, 2nd ffn [(ffn:7 | ffn:7)]
             @up.weight, dim 0, 1st ffn
             = %up, dim 2, 1st ffn         aten.linear      explained.py: a, b = self.up(x).chunk(2, dim=-1)
             = %chunk[0], dim 2            aten.chunk
             = %chunk[1], dim 2            aten.sub (%sub)  explained.py: return self.down(torch.cat([a - b, a + b], dim=-1))
             = %up, dim 2, 2nd ffn         aten.chunk       explained.py: a, b = self.up(x).chunk(2, dim=-1)
             = @up.weight, dim 0, 2nd ffn  aten.linear

        2. @up.bias, dim 0, 1st ffn [(ffn:7 | ffn:7)]
             @up.weight, dim 0, 1st ffn
             = @up.bias, dim 0, 1st ffn  aten.linear (%up)  explained.py: a, b = self.up(x).chunk(2, dim=-1)

        3. @up.bias, dim 0, 2nd ffn [(ffn:7 | ffn:7)]
             %up, dim 2, 2nd ffn
             = @up.bias, dim 0, 2nd ffn  aten.linear  explained.py: a, b = self.up(x).chunk(2, dim=-1)

        4. @down.weight, dim 1, 1st ffn [(ffn:7 | ffn:7)]
             %chunk[0], dim 2
             = %sub, dim 2                   aten.sub             explained.py: return self.down(torch.cat([a - b, a + b], dim=-1))
             = %cat, dim 2, 1st ffn          aten.cat
             = @down.weight, dim 1, 1st ffn  aten.linear (%down)

        5. @down.weight, dim 1, 2nd ffn [(ffn:7 | ffn:7)]
             %chunk[0], dim 2
             = %add, dim 2                   aten.add             explained.py: return self.down(torch.cat([a - b, a + b], dim=-1))
             = %cat, dim 2, 2nd ffn          aten.cat
             = @down.weight, dim 1, 2nd ffn  aten.linear (%down)
        """,
    )


def test_a_residual_stream_is_frozen_by_the_norm_and_its_layers_are_folded() -> None:
    expect(
        explain(explained.Blocks(), "h", IDS),
        """
        h: 10 residual units in 27 slices, frozen
        frozen: layer normalisation runs over the axis and centres it, which no rescaling can mend

        from @layers.0.norm.weight, dim 0 [h:10] to what freezes it:
             @layers.0.norm.weight, dim 0
             x frozen                      aten.layer_norm (%layers.0.norm)  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))

        tied to @embed.weight, dim 1 [h:10]:

        1. @layers.0.norm.weight, dim 0 [h:10]
             @embed.weight, dim 1
             = %embed, dim 2                 aten.embedding                    explained.py: x = self.embed(ids)
             = @layers.0.norm.weight, dim 0  aten.layer_norm (%layers.0.norm)  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))

        2. @layers.0.norm.bias, dim 0 [h:10]
             %embed, dim 2
             = @layers.0.norm.bias, dim 0  aten.layer_norm (%layers.0.norm)  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))

        3. @layers.0.up.weight, dim 1 [h:10]
             %embed, dim 2
             = %layers.0.norm, dim 2       aten.layer_norm             explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @layers.0.up.weight, dim 1  aten.linear (%layers.0.up)

        4. @layers.0.down.weight, dim 0 [h:10]
             %embed, dim 2
             = %layers.0.down, dim 2         aten.add (%layers.0)  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @layers.0.down.weight, dim 0  aten.linear

        5. @layers.0.down.bias, dim 0 [h:10]   (likewise in layers.1–4)
             %layers.0.down, dim 2
             = @layers.0.down.bias, dim 0  aten.linear  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))

        6. @layers.1.norm.weight, dim 0 [h:10]
             %embed, dim 2
             = %layers.0, dim 2              aten.add                          explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @layers.1.norm.weight, dim 0  aten.layer_norm (%layers.1.norm)

        7. @layers.1.norm.bias, dim 0 [h:10]   (likewise in layers.2–4)
             %layers.0, dim 2
             = @layers.1.norm.bias, dim 0  aten.layer_norm (%layers.1.norm)  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))

        8. @layers.1.up.weight, dim 1 [h:10]   (likewise in layers.2–4)
             %layers.0, dim 2
             = %layers.1.norm, dim 2       aten.layer_norm             explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @layers.1.up.weight, dim 1  aten.linear (%layers.1.up)

        9. @layers.1.down.weight, dim 0 [h:10]   (likewise in layers.2–4)
             %layers.0, dim 2
             = %layers.1.down, dim 2         aten.add (%layers.1)  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @layers.1.down.weight, dim 0  aten.linear

        10. @layers.2.norm.weight, dim 0 [h:10]   (likewise in layers.3–4)
             %layers.0, dim 2
             = %layers.1, dim 2              aten.add                          explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @layers.2.norm.weight, dim 0  aten.layer_norm (%layers.2.norm)

        11. @head.weight, dim 1 [h:10]
             %layers.3, dim 2
             = %layers.4, dim 2     aten.add             explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
             = @head.weight, dim 1  aten.linear (%head)  explained.py: return self.head(x)
        """,
    )


def test_deeper_models_have_no_longer_proofs() -> None:
    shallow, deep = (explain(explained.Blocks(depth), "h", IDS) for depth in (4, 9))
    assert len(shallow.splitlines()) == len(deep.splitlines())
    assert shallow.count("(likewise in layers.2–3)") == deep.count("(likewise in layers.2–8)") == 3


def test_what_is_summed_where_removed_entries_are_not_zero_is_frozen_by_the_sum() -> None:
    expect(
        explain(explained.Summed(), "up.weight:0"),
        """
        a3: 16 other units in 2 slices, frozen
        frozen: summed over where removed entries need not be zero
        names that begin with a dot are in up

        from @.weight, dim 0 [a3:16] to what freezes it:
             @.weight, dim 0
             = %up, dim 2       aten.linear                                          explained.py: gate = torch.sigmoid(self.up(x)).sum(-1, keepdim=True)
             = %sigmoid, dim 2  aten.sigmoid: removed entries are not zero after it
             x frozen           aten.sum (%sum)

        tied to @.weight, dim 0 [a3:16]:

        1. @.bias, dim 0 [a3:16]
             @.weight, dim 0
             = @.bias, dim 0  aten.linear (%up)  explained.py: gate = torch.sigmoid(self.up(x)).sum(-1, keepdim=True)
        """,
    )


def test_a_barrier_is_named_with_the_way_to_it() -> None:
    expect(
        explain(explained.Unknown(), "up.bias"),
        """
        a0: 16 other units in 2 slices, frozen
        frozen: no axis rule for aten.linalg_matrix_power
        names that begin with a dot are in up

        from @.bias, dim 0 [a0:16] to what freezes it:
             @.bias, dim 0
             = %up, dim 2         aten.linear                                      explained.py: return self.down(torch.linalg.matrix_power(self.up(x).unsqueeze(-1) *…
             = %unsqueeze, dim 2  aten.unsqueeze
             = %mul, dim 2        aten.mul
             x frozen             aten.linalg_matrix_power (%linalg_matrix_power)

        tied to @.bias, dim 0 [a0:16]:

        1. @.weight, dim 0 [a0:16]
             @.bias, dim 0
             = @.weight, dim 0  aten.linear (%up)  explained.py: return self.down(torch.linalg.matrix_power(self.up(x).unsqueeze(-1) *…
        """,
    )


def test_an_output_freezes() -> None:
    expect(
        explain(explained.Summed(), "table:1"),
        """
        a2: 12 other units in 1 slice, frozen
        frozen: dim 2 of an output of the model

        from @table, dim 1 [a2:12] to what freezes it:
             @table, dim 1
             = %select, dim 0  aten.select  explained.py: return gate * self.table[5]
             = %mul, dim 2     aten.mul
             x frozen          output

        @table, dim 1 [a2:12] is its only slice
        """,
    )


def test_what_no_operator_sums_over_says_what_meets_it() -> None:
    expect(
        explain(explained.Summed(), "table:0").partition("\n\n")[0],
        """
        a0: 5 other units in 1 slice, frozen
        frozen: no operator sums over the axis: its entries are only picked or passed on
        operators that meet it: aten.select
        """,
    )


def test_an_adapter_follows_its_base_through_one_operator() -> None:
    config = peft.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
    expect(
        explain(peft.get_peft_model(explained.Rotated(), config), "ffn", {"x": STATES}),
        """
        ffn: 7 ffn units in 4 slices, prunable
        names that begin with a dot are in base_model.model

        tied to @.up.base_layer.weight, dim 0, 1st ffn [(ffn:7 | ffn:7)]:

        1. @.up.base_layer.weight, dim 0, 2nd ffn [(ffn:7 | ffn:7)]
             @.up.base_layer.weight, dim 0, 1st ffn
             = %.up, dim 2, 1st ffn                    lora.linear  explained.py: a, b = self.up(x).chunk(2, dim=-1)
             = %.chunk[0], dim 2                       aten.chunk
             = %.chunk[1], dim 2                       aten.sub     explained.py: return self.down(torch.cat([a - b, a + b], dim=-1))
             = %.up, dim 2, 2nd ffn                    aten.chunk   explained.py: a, b = self.up(x).chunk(2, dim=-1)
             = @.up.base_layer.weight, dim 0, 2nd ffn  lora.linear

        2. @.up.base_layer.bias, dim 0, 1st ffn [(ffn:7 | ffn:7)]
             @.up.base_layer.weight, dim 0, 1st ffn
             = @.up.base_layer.bias, dim 0, 1st ffn  lora.linear (%.up)  explained.py: a, b = self.up(x).chunk(2, dim=-1)

        3. @.up.base_layer.bias, dim 0, 2nd ffn [(ffn:7 | ffn:7)]
             %.up, dim 2, 2nd ffn
             = @.up.base_layer.bias, dim 0, 2nd ffn  lora.linear  explained.py: a, b = self.up(x).chunk(2, dim=-1)

        4. @.up.lora_B.default.weight, dim 0, 1st ffn [(ffn:7 | ffn:7)]
             @.up.base_layer.weight, dim 0, 1st ffn
             = @.up.lora_B.default.weight, dim 0, 1st ffn  lora.linear (%.up)  explained.py: a, b = self.up(x).chunk(2, dim=-1)

        5. @.up.lora_B.default.weight, dim 0, 2nd ffn [(ffn:7 | ffn:7)]
             %.up, dim 2, 2nd ffn
             = @.up.lora_B.default.weight, dim 0, 2nd ffn  lora.linear  explained.py: a, b = self.up(x).chunk(2, dim=-1)

        6. @.down.weight, dim 1, 1st ffn [(ffn:7 | ffn:7)]
             %.chunk[0], dim 2
             = %.sub, dim 2                   aten.sub              explained.py: return self.down(torch.cat([a - b, a + b], dim=-1))
             = %.cat, dim 2, 1st ffn          aten.cat
             = @.down.weight, dim 1, 1st ffn  aten.linear (%.down)

        7. @.down.weight, dim 1, 2nd ffn [(ffn:7 | ffn:7)]
             %.chunk[0], dim 2
             = %.add, dim 2                   aten.add              explained.py: return self.down(torch.cat([a - b, a + b], dim=-1))
             = %.cat, dim 2, 2nd ffn          aten.cat
             = @.down.weight, dim 1, 2nd ffn  aten.linear (%.down)
        """,
    )


def test_a_dim_of_one_has_nothing_to_explain() -> None:
    said = explain(nn.Linear(10, 1), "weight:0")
    assert said == "weight:0 has no axis: a dim of size 1 cannot lose its only index"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fn", "the model has no group or parameter 'fn'; near names: ffn"),
        ("ffnn:0", "the model has no group or parameter 'ffnn:0'; near names: ffn"),
        ("up.weight:2", "up.weight has 2 dims, counted from 0: there is no dim 2"),
        ("up.weight:", "up.weight has 2 dims, counted from 0: there is no dim without a number"),
    ],
)
def test_a_name_that_is_not_there_is_refused(name: str, said: str) -> None:
    with pytest.raises(ShearError) as refused:
        explain(explained.Block(), name)
    assert str(refused.value) == said


def test_a_block_is_what_lies_between_two_values_of_its_stream() -> None:
    expect(
        explain(explained.Blocks(), "block", IDS),
        """
        block: 5 block units in 30 slices, prunable
        names that begin with a dot are in layers

        from what enters each unit, over the sums of its blocks, to what leaves it:

        1. %.0
             %embed
             -> %.0  aten.add  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))

        2. %.1   (likewise in layers.2–4)
             %.0
             -> %.1  aten.add  explained.py: return x + self.down(F.gelu(self.up(self.norm(x))))
        """,
    )


def test_an_expert_is_tied_to_its_router_by_the_numbers_that_topk_chooses() -> None:
    expect(
        explain(explained.Experts(), "e", torch.zeros(2, 10)),
        """
        e: 5 expert units in 3 slices, prunable

        tied to @up, dim 0 [e:5]:

        1. @down, dim 0 [e:5]
             @up, dim 0
             = %topk[1], its entries  aten.index (%index)    explained.py: up, down = self.up[chosen], self.down[chosen]
             = @down, dim 0           aten.index (%index_1)

        2. @router.weight, dim 0 [e:5]
             %topk[1], its entries
             = %softmax, dim 1        aten.topk     explained.py: weights, chosen = torch.softmax(self.router(x), dim=-1).topk(2, dim=-…
             = %router, dim 1         aten.softmax
             = @router.weight, dim 0  aten.linear
        """,
    )
