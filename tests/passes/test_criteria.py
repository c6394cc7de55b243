"""Criteria against references that know the model and keep everything: autograd by hand, statistics in two passes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_passes.importance.base import Importance, collect
from shear_passes.importance.bonsai import Bonsai, MaskStatistics, coefficients
from shear_passes.importance.calibration import Calibration, Data
from shear_passes.importance.gradients import GradientStatistics
from shear_passes.importance.lora_guided import LoraGuided
from shear_passes.importance.magnitude import Magnitude
from shear_passes.importance.mini_llm import ForwardGradients, ForwardGradientStatistics, MiniLlm
from shear_passes.importance.reading import Flap, Minitron, Wanda
from shear_passes.importance.taylor import Taylor
from tests.calibrated import (
    HEAD,
    batches,
    close,
    gradients,
    inputs_of,
    manager,
    of,
    scores,
    slices_of,
    traced,
    weight_of,
)

READERS = [
    ("llama_gqa", "ffn1", "model.layers.1.mlp.down_proj", 1),
    ("llama_gqa", "kv0", "model.layers.0.self_attn.o_proj", 4 * HEAD),
    ("gpt2", "ffn0", "transformer.h.0.mlp.c_proj", 1),
    ("bert", "kv1", "bert.encoder.layer.1.attention.output.dense", 8),
]


@pytest.mark.parametrize(("family", "group", "path", "width"), READERS)
def test_wanda_is_the_weight_times_the_norm_of_what_it_reads(family: str, group: str, path: str, width: int) -> None:
    x, weight = inputs_of(family, path).flatten(0, 1), weight_of(family, path)
    feature = torch.stack([(weight[:, j].abs() * x[:, j].norm()).mean() for j in range(x.shape[1])])
    close(of(scores(Wanda(), family), group, family), feature.reshape(-1, width).sum(1))
    summed = of(scores(Wanda(rows="sum", features="max"), family), group, family)
    close(summed, feature.reshape(-1, width).amax(1) * len(weight))


@pytest.mark.parametrize(("family", "group", "path", "width"), READERS)
def test_flap_is_the_variance_times_the_square_of_the_weight(family: str, group: str, path: str, width: int) -> None:
    x, weight = inputs_of(family, path).flatten(0, 1), weight_of(family, path)
    feature = (x - x.mean(0)).square().mean(0) * weight.square().sum(0)
    close(of(scores(Flap(), family), group, family), feature.reshape(-1, width).mean(1))


@pytest.mark.parametrize(("family", "group", "path", "width"), READERS)
def test_minitron_is_the_mean_activation_in_l2_over_rows(family: str, group: str, path: str, width: int) -> None:
    feature = inputs_of(family, path).abs().mean(1).norm(dim=0)
    close(of(scores(Minitron(), family), group, family), feature.reshape(-1, width).norm(dim=1))


def test_minitron_of_a_channel_of_the_stream_is_that_of_the_norms_outputs() -> None:
    paths = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
    close(of(scores(Minitron()), "h"), sum(inputs_of("llama_gqa", p).abs().mean(1).norm(dim=0) for p in paths))  # type: ignore[arg-type]


def test_the_criteria_of_a_convolution_see_its_channels() -> None:
    data = [torch.randn(2, 3, 12, 12) for _ in range(2)]
    model, _, groups = traced("depthwise_separable")
    seen: list[Tensor] = []
    hook = model.project[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].double().transpose(0, 1).flatten(1))
    )  # type: ignore[index, union-attr]
    with torch.no_grad():
        for batch in data:
            model(batch)
    hook.remove()
    weight = model.project[0].weight.detach().double()  # type: ignore[index, union-attr]
    x = torch.cat(seen, dim=1)
    group = next(g for g in groups if "project.0.weight" in g.parameters and g.size == 22)
    found = scores(Flap(), "depthwise_separable", data)[group]
    parts = x.var(1, correction=0) * weight.square().sum((0, 2, 3))
    squeezed = of_squeeze(model, data)
    close(found, parts + squeezed, rtol=1e-3)


def of_squeeze(model: nn.Module, data: Sequence[Tensor]) -> Tensor:
    """FLAP's score at the other consumer of the same channels, which reads their means."""
    seen: list[Tensor] = []
    hook = model.squeeze.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for batch in data:
            model(batch)
    hook.remove()
    return torch.cat(seen)[..., 0, 0].var(0, correction=0) * model.squeeze.weight.detach().double().square().sum(
        (0, 2, 3)
    )  # type: ignore[union-attr, operator]


def taylor_by_hand(order: Any, vector: bool, name: str, size: int) -> Tensor:
    weights = {n: p.detach().double() for n, p in traced("llama_gqa")[0].named_parameters()}
    rows = [{"input_ids": ids[None]} for batch in batches() for ids in batch["input_ids"]]
    each = gradients(rows)
    found = []
    for unit in range(size):
        total = torch.zeros((), dtype=torch.float64)
        for parameter, place in slices_of(name, unit):
            w = weights[parameter][place]
            first = torch.stack([g[parameter][place] for g in each]).mean(0) * w
            second = 0.5 * w.square() * torch.stack([g[parameter][place].square() for g in each]).mean(0)
            term = {1: first, 2: second, "mixed": first - second}[order]
            total += term.sum() if vector else term.abs().sum()
        found.append(total.abs())
    return torch.stack(found)


@pytest.mark.parametrize(("order", "vector"), [(1, False), (2, False), ("mixed", False), (1, True)])
@pytest.mark.parametrize(("group", "size"), [("kv1", 2), ("ffn0", 44)])
def test_taylor_is_autograd_by_hand(order: Any, vector: bool, group: str, size: int) -> None:
    close(of(scores(Taylor(order=order, vector=vector)), group), taylor_by_hand(order, vector, group, size), rtol=1e-3)


def test_a_batch_of_rows_counts_as_its_rows() -> None:
    rows = [{"input_ids": ids[None]} for batch in batches() for ids in batch["input_ids"]]
    close(of(scores(Taylor()), "ffn0"), torch.from_numpy(of(scores(Taylor(), data=rows), "ffn0")))


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_norm_of_all_slices(p: Any) -> None:
    weights = {n: w.detach().double() for n, w in traced("llama_gqa")[0].named_parameters()}
    flat = [torch.cat([weights[n][place].flatten() for n, place in slices_of("kv0", unit)]) for unit in (0, 1)]
    close(of(scores(Magnitude(p=p)), "kv0"), torch.stack([w.norm(p=p) for w in flat]))


def mean_of_rows(outputs: Any, feed: Any) -> Tensor:
    """Each row counts the same, however many tokens it has."""
    logits, ids, valid = outputs.logits[:, :-1], feed["input_ids"][:, 1:], feed["attention_mask"][:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * valid
    return (each.sum(1) / valid.sum(1).clamp_min(1)).square().mean().sqrt()


class Quadratic(nn.Module):
    """A loss whose gradient is known: of the mean square of a linear map and its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def mean_square(outputs: Tensor, feed: Any) -> Tensor:
    return outputs.square().mean()


def estimated(directions: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The estimate by forward passes, and autograd's gradient, of all weights as one vector."""
    torch.manual_seed(3)
    model, data = Quadratic(), [torch.randn(5, 7, 4)]
    mine = sir.analyses(sir.trace(model))
    mine.put(Data(), Calibration(model, data, loss=mean_square))
    found: ForwardGradients = mine.get(ForwardGradientStatistics(directions=directions, epsilon=1e-2, seed=seed))
    mean_square(model(data[0]), None).backward()
    named = dict(model.named_parameters())
    estimate = torch.cat([found.gradient(n, p).flatten() for n, p in named.items()])
    return estimate, torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])


def test_forward_gradients_point_along_the_gradient_in_expectation() -> None:
    few, true = estimated(8)
    many, _ = estimated(1500)
    cosine = nn.functional.cosine_similarity
    assert float(cosine(many, true, dim=0)) > 0.97 > float(cosine(few, true, dim=0))
    assert float(many.norm() / true.norm()) == pytest.approx(1.0, abs=0.1)


def test_directions_are_drawn_again_from_their_seed() -> None:
    one, two, other = (estimated(5, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_trying_other_weights_leaves_them_bit_for_bit() -> None:
    model, _, _ = traced("llama_gqa")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scores(MiniLlm(directions=2))
    scores(Bonsai(masks=3))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_mini_llm_is_weight_times_slope_times_what_the_weight_reads() -> None:
    asked = MiniLlm(directions=3, seed=4)
    mine = manager("llama_gqa")
    found = mine.get(asked)
    forward: ForwardGradients = mine.get(ForwardGradientStatistics(3, seed=4))
    total = torch.zeros(44, dtype=torch.float64)
    for name in ("gate_proj", "up_proj", "down_proj"):
        path = f"model.layers.0.mlp.{name}"
        weight = weight_of("llama_gqa", path)
        norms = inputs_of("llama_gqa", path).flatten(0, 1).norm(dim=0)
        element = (weight * forward.gradient(f"{path}.weight", weight.float())).abs() * norms
        total += element.sum(0 if name == "down_proj" else 1)
    close(of(found, "ffn0"), total)


def test_the_loss_under_a_mask_is_that_of_zeroed_slices() -> None:
    model, _, _ = traced("llama_gqa")
    found = manager("llama_gqa").get(MaskStatistics(count=2))
    names = [g.name for g in found.groups]
    mask, start = found.masks[1], 0
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for group, name in zip(found.groups, names, strict=True):
            assert mask[start : start + group.size].sum() == group.size // 2
            for unit in np.flatnonzero(~mask[start : start + group.size]):
                for parameter, place in slices_of(name, int(unit)):
                    model.get_parameter(parameter)[place] = 0.0
            start += group.size
        wanted = np.mean([float(model(**b, labels=b["input_ids"]).loss) for b in batches()])
        for n, p in model.named_parameters():
            p.copy_(saved[n])
    assert found.losses[1] == pytest.approx(wanted, rel=1e-5)


def test_regression_on_masks_finds_the_units_that_matter() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=30)
    masks = draw.random((400, 30)) < 0.5
    np.testing.assert_allclose(coefficients(masks, masks @ truth + 2.0, 1e-9), truth, atol=1e-6)


def test_bonsai_scores_what_its_masks_cover_and_says_so_of_the_rest() -> None:
    found = scores(Bonsai(masks=8))
    assert of(found, "ffn0").shape == (44,)
    with pytest.raises(PlanError, match=r"bonsai cannot score h \(residual\): its masks are of the kinds ffn, kv_head"):
        of(found, "h")


def test_what_no_consumer_reads_is_said_and_never_guessed() -> None:
    with pytest.raises(PlanError, match=r"wanda cannot score r \(rotary_pair\): no product of a parameter"):
        of(scores(Wanda()), "r")


def test_several_criteria_share_one_pass() -> None:
    passes: list[int] = []
    mine = manager("llama_gqa", iter(batches()), progress=lambda done, total: passes.append(done))
    criteria = [Wanda(), Flap(), Minitron(), Taylor(), Taylor(order="mixed"), MiniLlm(directions=1)]
    collect([s for c in criteria for s in c.statistics()], mine)
    together = [of(mine.get(c), "ffn1") for c in criteria]
    assert passes == [1, 2]
    for criterion, found in zip(criteria, together, strict=True):
        np.testing.assert_allclose(found, of(scores(criterion), "ffn1"), rtol=1e-4)


ALL = [
    Taylor(), Taylor(order=2), Taylor(order="mixed"), Taylor(vector=True), LoraGuided(rank=2), MiniLlm(directions=2),
    Bonsai(masks=3), Wanda(), Flap(), Minitron(),
]  # fmt: skip


def padded() -> list[dict[str, Tensor]]:
    """Rows of 9, 4 and 6 tokens; of 7 and of a single one, of which none is predicted."""
    found = []
    for lengths in ((9, 4, 6), (7, 1)):
        ids = torch.randint(3, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(max(lengths)))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@functools.cache
def alone(criterion: Importance) -> dict[str, Any]:
    return {name: of(scores(criterion, data=padded()), name) for name in ("ffn1", "kv0")}


@pytest.mark.unlike
@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(ALL, 2)], ids=str)
def test_scores_do_not_depend_on_who_shares_the_pass(one: Importance, other: Importance) -> None:
    mine = manager("llama_gqa", padded())
    collect([s for criterion in (one, other) for s in criterion.statistics()], mine)
    for criterion in (one, other):
        for name, wanted in alone(criterion).items():
            # Two sums of the same terms in another order.
            np.testing.assert_allclose(of(mine.get(criterion), name), wanted, rtol=1e-4, err_msg=str(criterion))


@pytest.mark.parametrize("loss", [None, mean_of_rows], ids=["its own", "a function"])
def test_a_loss_of_ones_own_means_the_same_in_company(loss: Any) -> None:
    mine = manager("llama_gqa", padded(), loss=loss)
    collect([*Taylor().statistics(), *Taylor(order=2).statistics()], mine)
    one = scores(Taylor(), data=padded(), loss=loss)
    np.testing.assert_allclose(of(mine.get(Taylor()), "ffn1"), of(one, "ffn1"), rtol=1e-4)


def test_the_gradient_of_padded_rows_is_that_of_the_mean_over_all_tokens() -> None:
    model = traced("llama_gqa")[0]
    model.zero_grad()
    losses = []
    for batch in padded():
        logits = model(**batch).logits[:, :-1]
        valid = batch["attention_mask"][:, 1:].bool()
        losses.append(nn.functional.cross_entropy(logits[valid], batch["input_ids"][:, 1:][valid], reduction="none"))
    torch.cat(losses).mean().backward()
    found = manager("llama_gqa", padded()).get(GradientStatistics())
    for name, parameter in model.named_parameters():
        if name in found.mean:
            torch.testing.assert_close(found.mean[name], parameter.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad(set_to_none=True)


def test_gradients_without_a_loss_are_refused() -> None:
    with pytest.raises(PlanError, match="needs a loss, and ViTForImageClassification gives none: put labels"):
        scores(Taylor(), "vit", [{"pixel_values": torch.randn(2, 3, 30, 30)}])
