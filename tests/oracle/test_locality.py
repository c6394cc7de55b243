"""Every call of every model of the zoo is local; and the oracle itself notices rules that lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shear_ir.axes import Dims
from shear_passes.ops import registry
from shear_passes.ops.registry import Entry, Site, Vanish
from tests.oracle.locality import Unsound, assert_local
from tests.zoo import FAMILIES, MLP

aten = torch.ops.aten
QUICK = ("mlp", "concat_and_split", "depthwise_separable", "llama_gqa", "gpt_neox", "mixtral_batched")


@pytest.mark.unlike
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)  # fmt: skip
def test_no_kept_entry_hangs_on_a_removed_one(name: str) -> None:
    assert any(g.prunable for g in assert_local(FAMILIES[name](), rounds=2))


def lie(monkeypatch: pytest.MonkeyPatch, op: Any, rule: Callable[..., Any], vanish: Vanish = Vanish.NEVER) -> None:
    monkeypatch.setitem(
        registry._RULES, op, replace(registry._RULES.get(op, Entry(rule, vanish)), rule=rule, vanish=vanish)
    )


def test_a_rule_that_forgets_an_equation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(site: Site, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
        site.contract([weight[1]], [(0, x[:-1]), (1, weight[:1])], added=[2])
        return (*x[:-1], weight[0])

    lie(monkeypatch, aten.linear.default, linear)
    with pytest.raises(Unsound, match="kept entries do not fit together at %linear"):
        assert_local(MLP())


class Gated(nn.Module):
    """A sigmoid in between: what it makes of a removed unit is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.up(x)))


class Normed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.sigmoid(self.up(x))))


def test_a_rule_that_forgets_to_freeze_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer_norm(site: Site, x: Dims, shape: Any, weight: Dims, bias: Dims, *_: Any) -> Dims:
        site.equate(x[-1], weight[0])
        site.equate(x[-1], bias[0])
        return x

    lie(monkeypatch, aten.layer_norm.default, layer_norm)
    with pytest.raises(Unsound, match="kept entries hang on removed ones at %layer_norm"):
        assert_local(Normed())


def test_a_law_that_promises_zeros_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, aten.sigmoid.default, lambda site, x: x, Vanish.FIRST)
    with pytest.raises(Unsound, match="entries said to be zero are not at %sigmoid"):
        assert_local(Gated())


def test_a_view_that_loses_entries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, aten.reshape.default, lambda site, x, shape: site.fresh(), Vanish.MOVED)
    with pytest.raises(Unsound, match=r"\d+ entries come in and \d+ stay at %reshape"):
        assert_local(Reshaped())


class Reshaped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).reshape(-1, 2, 5).reshape(-1, 10))
