"""Experts are free where the scores of removed ones lose, in whatever order a router does its steps; held elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.ops.typed import typed

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
INF = float("inf")
EXPERTS, HIDDEN, OUT, TOKENS = 6, 4, 7, 3


def mixture(choose: Choose) -> str:
    """Which experts ``choose`` takes for every token, by the scores ``(tokens, experts)``, and with what weights."""

    def forward(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
        weights, chosen = choose(x @ router.T)
        return (weights[..., None] * experts[chosen]).sum(1)

    return typed(forward, x=(TOKENS, HIDDEN), router=(EXPERTS, HIDDEN), experts=(EXPERTS, OUT))


def biased(choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """As ``mixture``, with a vector that has an entry for every expert."""

    def forward(x: Tensor, router: Tensor, bias: Tensor, experts: Tensor) -> Tensor:
        weights, chosen = choose(x @ router.T, bias)
        return (weights[..., None] * experts[chosen]).sum(1)

    return typed(forward, x=(TOKENS, HIDDEN), router=(EXPERTS, HIDDEN), bias=(EXPERTS,), experts=(EXPERTS, OUT))


def softmax_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = scores.softmax(-1).topk(2, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


def choice_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = scores.topk(2, dim=-1)
    return weights.softmax(-1), chosen


def sigmoid(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.sigmoid().topk(2, dim=-1)  # type: ignore[return-value]


def one_after_the_other(scores: Tensor) -> tuple[Tensor, Tensor]:
    first = scores.argmax(-1, keepdim=True)
    second = scores.scatter(-1, first, -INF).max(-1, keepdim=True)[1]
    chosen = torch.cat([first, second], -1)
    return scores.softmax(-1).gather(-1, chosen), chosen


def by_choice(scores: Tensor) -> tuple[Tensor, Tensor]:
    chosen = scores.topk(2, dim=-1)[1]
    return torch.ones(TOKENS, 2), chosen


@pytest.mark.parametrize("choose", [softmax_first, choice_first, sigmoid, one_after_the_other])
def test_router_and_experts_share_an_axis_that_is_free(choose: Choose) -> None:
    text = mixture(choose)
    assert "router  [c:6, b:4]" in text
    assert "experts [c:6, d:7]" in text


def test_a_bias_that_only_chooses_is_a_score_as_well() -> None:
    def choose(scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (scores.sigmoid() + bias).topk(2, dim=-1)[1]
        return scores.sigmoid().gather(1, chosen), chosen

    assert "bias    [c:6]" in biased(choose)


def test_of_groups_of_experts_both_the_groups_and_their_places_are_free() -> None:
    def choose(scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weights, biased = scores.sigmoid(), scores.sigmoid() + bias
        best = biased.view(-1, 3, 2).topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
        stay = torch.zeros(TOKENS, 3).scatter(1, best, 1).unsqueeze(-1).expand(-1, 3, 2).reshape(-1, EXPERTS)
        chosen = biased.masked_fill(~stay.bool(), -INF).topk(3, dim=-1)[1]
        return weights.gather(1, chosen), chosen

    text = biased(choose)
    assert "router  [c:3 * d:2, b:4]" in text
    assert "bias    [c:3 * d:2]" in text


def test_all_experts_may_run_where_those_that_were_not_chosen_weigh_nothing() -> None:
    def forward(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
        scores = x @ router.T
        best, chosen = scores.topk(2, dim=-1)
        weights = torch.full_like(scores, -INF).scatter_(1, chosen, best).sigmoid()
        counted = functional.one_hot(chosen, EXPERTS).sum(1)
        return (weights * counted) @ experts

    text = typed(forward, x=(TOKENS, HIDDEN), router=(EXPERTS, HIDDEN), experts=(EXPERTS, OUT))
    assert "experts [c:6, d:7]" in text


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (lambda s: s.topk(2, dim=-1, largest=False), "entries are ranked along the axis at %topk"),
        (lambda s: s.tanh().topk(2, dim=-1), "entries are ranked along the axis at %topk"),
        (lambda s: s.abs().topk(2, dim=-1), "entries are ranked along the axis at %topk"),
        (lambda s: (-s).topk(2, dim=-1), "entries are ranked along the axis at %topk"),
        (lambda s: (s.topk(2, dim=-1)[0], (s.topk(2, dim=-1)[1] + 1) % 6), "numbers of its indices are used at %add"),
        (lambda s: (s, s.argsort(-1)), "entries are ranked along the axis at %argsort"),
        (
            lambda s: by_choice(s.masked_fill(s < 0.0, -INF)),
            "how many candidates a choice leaves is not known after %masked_fill",
        ),
        (lambda s: s.masked_fill(s < 0.0, 0.0).topk(2, dim=-1), "entries are ranked along the axis at %topk"),
    ],
)
def test_a_choice_that_is_not_understood_holds_the_experts(choose: Choose, reason: str) -> None:
    text = mixture(choose)
    assert "router  [c!:6, b:4]" in text
    assert reason in text


def test_memory_that_was_written_to_since_is_not_what_it_was() -> None:
    def negated(scores: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores.softmax(-1)
        seen = weights.view(TOKENS, EXPERTS)
        weights.mul_(-1.0)
        return seen.topk(2, dim=-1)  # type: ignore[return-value]

    def closed(scores: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores.clone()
        seen = weights.view(TOKENS, EXPERTS)
        weights.masked_fill_(scores < 0.0, -INF)
        return by_choice(seen)

    assert "entries are ranked along the axis at %topk" in mixture(negated)
    assert "how many candidates a choice leaves is not known after %view" in mixture(closed)


def test_the_largest_entry_alone_chooses_nothing() -> None:
    def forward(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = (x @ w.T).relu()
        return (y @ v) * y.max(-1, keepdim=True)[0]

    text = typed(forward, x=(TOKENS, HIDDEN), w=(EXPERTS, HIDDEN), v=(EXPERTS, OUT))
    assert "c: an extreme is taken over the axis at %max_dim" in text


def test_scores_that_no_plain_product_makes_hold_the_experts() -> None:
    def forward(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
        weights, chosen = softmax_first(x @ functional.normalize(router).T)
        return (weights[..., None] * experts[chosen]).sum(1)

    text = typed(forward, x=(TOKENS, HIDDEN), router=(EXPERTS, HIDDEN), experts=(EXPERTS, OUT))
    assert "softmax runs over the axis at %softmax_int" in text


def test_a_router_that_makes_more_than_scores_holds_the_experts() -> None:
    def forward(x: Tensor, router: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = softmax_first(x @ router.T)
        return (weights[..., None] * experts[chosen]).sum(1), (router * 2).sum()

    text = typed(forward, x=(TOKENS, HIDDEN), router=(EXPERTS, HIDDEN), experts=(EXPERTS, OUT))
    assert "c: what scores the axis is read in another way at %mul_tensor" in text
