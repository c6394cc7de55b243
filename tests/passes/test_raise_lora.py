"""Adapters raised to composed operators: the same function and gradients, whatever PEFT was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shear_backends.graph.module import graph_module, named_tensors
from shear_ir.frontend.export import trace
from shear_ir.frontend.inputs import Inputs, example_inputs
from shear_ir.manager import AnalysisManager, PassManager
from shear_ir.program import Program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.dump import Dump
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.pipelines import parse_pipeline
from shear_passes.rewrite.raise_lora import RaiseLora
from tests import roads
from tests.golden import expect, expect_file
from tests.zoo import FAMILIES, randomised

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:.*lora_bias", "ignore:Already found", "ignore:LoRA adapter added to ConvNd"
)

VARIANTS: Mapping[str, tuple[str, list[str], dict[str, Any]]] = {
    "linear": ("mlp", ["gate", "down"], {}),
    "rslora": ("mlp", ["gate"], {"use_rslora": True}),
    "dropout": ("mlp", ["gate"], {"lora_dropout": 0.1}),
    "bias of B": ("mlp", ["gate", "up"], {"lora_bias": True}),
    "dora": ("mlp", ["gate", "up"], {"use_dora": True}),
    "conv": ("resnet", ["conv1"], {}),
    "conv dora": ("resnet", ["conv1"], {"use_dora": True}),
    "Conv1D": ("gpt2", ["c_attn"], {}),
    "Conv1D dora": ("gpt2", ["c_attn"], {"use_dora": True}),
    "embedding": ("bloom", ["word_embeddings"], {}),
    "embedding dora": ("bloom", ["word_embeddings"], {"use_dora": True}),
    "experts": ("mixtral", [], {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


def adapted(family: str, targets: list[str], **options: Any) -> nn.Module:
    """A family with adapters whose tensors are all drawn; names are those of the base."""
    config = peft.LoraConfig(target_modules=targets, **{"r": 3, "lora_alpha": 7, **options})
    return randomised(peft.inject_adapter_in_model(config, FAMILIES[family]()))


def with_two(first: Mapping[str, Any], second: Mapping[str, Any]) -> nn.Module:
    """The gated MLP with two active adapters on its gate."""
    model = adapted("mlp", ["gate"], **first)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["gate"], **second), model, adapter_name="other")
    layer: Any = model.gate
    layer.set_adapter(["default", "other"])
    return randomised(model)


def inputs_of(model: nn.Module) -> Inputs:
    shapes = {"gate": (3, 7, 12), "stem": (2, 3, 14, 14)}
    found = next((shape for name, shape in shapes.items() if hasattr(model, name)), None)
    return example_inputs(model) if found is None else {"x": torch.randn(found)}


def raised(program: Program) -> Program:
    return PassManager([RaiseLora()]).run(program).program


def composed(program: Program) -> list[fx.Node]:
    return [n for n in program.calls() if str(n.target).startswith("lora.")]


def values_and_gradients(program: Program, model: nn.Module, feed: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    module = graph_module(program, named_tensors(model))
    with torch.enable_grad():
        (out,) = module(**feed)
        out.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_raised_adapter_is_one_call_with_the_same_values_and_gradients(variant: str) -> None:
    family, targets, options = VARIANTS[variant]
    model = adapted(family, targets, **options)
    feed = inputs_of(model)
    raw = trace(model, feed)
    single = raised(raw)
    layers = sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
    assert len(composed(single)) == layers > 0
    (expected, of_raw), (found, of_single) = (values_and_gradients(p, model, feed) for p in (raw, single))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert of_raw.keys() <= of_single.keys()
    for name in (n for n in of_raw if "lora_" in n):
        torch.testing.assert_close(of_single[name], of_raw[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_raised_and_sheared_graph_is_the_masked_original(variant: str) -> None:
    family, targets, options = VARIANTS[variant]
    model = adapted(family, targets, **options)
    found = roads.trace(model, inputs_of(model))
    able = [g for g in found.groups if g.prunable and g.size > 1]
    assert {"lora_rank"} < {g.kind for g in able}
    plan = found.without({group: roads.units(group, 0.4, seed) for seed, group in enumerate(able)})
    report = found.report(found.graph(plan), plan)
    assert report.sound, report
    assert report.moved > 0.01


@pytest.mark.parametrize(
    ("first", "second"), [({}, {"use_rslora": True}), ({"use_dora": True}, {}), ({}, {"lora_bias": True})]
)
def test_two_adapters_are_one_call_with_two_ranks(first: dict[str, Any], second: dict[str, Any]) -> None:
    model = with_two(first, second)
    found = roads.trace(model, inputs_of(model))
    (call,) = composed(found.program)
    assert len(call.kwargs["A"]) == 2  # type: ignore[arg-type]
    assert sorted(g.size for g in found.groups if g.kind == "lora_rank" and g.prunable) == [2, 3]
    plan = found.without({g: roads.units(g, 0.4) for g in found.groups if g.prunable})
    assert found.report(found.graph(plan), plan).sound


def test_a_magnitude_over_what_another_adapter_added_stays_as_it_is() -> None:
    model = with_two({}, {"use_dora": True})
    feed = inputs_of(model)
    single = raised(trace(model, feed))
    (call,) = composed(single)
    assert len(call.kwargs["A"]) == 1  # type: ignore[arg-type]
    (found,) = graph_module(single, named_tensors(model))(**feed)
    torch.testing.assert_close(found, model(**feed), atol=1e-5, rtol=1e-5)


class Branched(nn.Module):
    """A base and a branch of low rank, joined as ``join`` says."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def test_structure_counts_and_not_the_class() -> None:
    program = trace(Branched(lambda m, x: 0.5 * (2 * m.b(m.a(x))) + m.base(x)), {"x": torch.zeros(3, 6)})
    expect(
        str(raised(program)),
        """
        %x           : f32[3, 6] = input
        @base.weight : f32[8, 6] = param
        @base.bias   : f32[8]    = param
        @a.weight    : f32[2, 6] = param
        @b.weight    : f32[8, 2] = param
        %linear      : f32[3, 8] = lora.linear(%x, @base.weight, @base.bias, A=[@a.weight], B=[@b.weight], scale=[1.0])
        return %linear
        """,
    )


@pytest.mark.parametrize(
    "join",
    [
        lambda m, x: m.base(x) + m.b(torch.relu(m.a(x))),
        lambda m, x: m.base(x) + m.b(m.a(x.tanh())),
        lambda m, x: m.base(x) - m.b(m.a(x)),
        lambda m, x: m.base(x) * m.b(m.a(x)),
        lambda m, x: m.base(x) + x.mean() * m.b(m.a(x)),
        lambda m, x: m.b(m.a(x)) + x.mean(),
    ],
    ids=["activation", "another input", "difference", "product", "scale by value", "no base"],
)
def test_what_is_no_adapter_is_none(join: Callable[[Any, Tensor], Tensor]) -> None:
    program = trace(Branched(join), {"x": torch.zeros(3, 6)})
    assert raised(program) is program


def test_a_value_that_others_read_is_not_computed_twice() -> None:
    program = trace(Branched(lambda m, x: (m.base(x) + m.b(low := m.a(x))).sum() + low.sum()), {"x": torch.zeros(3, 6)})
    assert raised(program) is program
    assert [g.kind for g in AnalysisManager(program).get(FindGroups())].count("lora_rank") == 1


def test_groups_of_a_convolution_couple_rank_and_channels_and_stay() -> None:
    model = adapted("depthwise_separable", ["depthwise.0"], r=22)
    program = trace(model, {"x": torch.zeros(2, 3, 14, 14)})
    assert raised(program) is program
    assert not any(g.kind == "lora_rank" for g in AnalysisManager(program).get(FindGroups()))


def test_a_row_without_direction_gives_zero_where_zero_divides_zero() -> None:
    x, a, b, magnitude = torch.ones(1, 3), torch.zeros(2, 3), torch.zeros(4, 2), torch.ones(4, requires_grad=True)
    weight = torch.eye(4, 3)
    y = torch.ops.lora.linear(x, weight, A=[a], B=[b], scale=[1.0], magnitude=[magnitude])
    y.sum().backward()
    assert y.tolist() == [[1, 1, 1, 0]]
    assert magnitude.grad is not None
    assert magnitude.grad.tolist() == [1, 1, 1, 0]


def test_raising_costs_nothing() -> None:
    model = adapted("mlp", ["gate", "up"])
    raw = trace(model, inputs_of(model))
    assert AnalysisManager(raw).get(MeasureCosts()).now == AnalysisManager(raised(raw)).get(MeasureCosts()).now


def test_a_raised_graph_exports_and_decomposes_into_aten() -> None:
    model = adapted("mlp", ["gate"], lora_dropout=0.1)
    feed = inputs_of(model)
    module = graph_module(raised(trace(model, feed)), named_tensors(model))
    exported = torch.export.export(module, (feed["x"],)).run_decompositions()
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert names
    assert not any(name.startswith("lora") for name in names)
    torch.testing.assert_close(exported.module()(feed["x"])[0], model(**feed))


def test_the_pipeline_spells_it() -> None:
    model = adapted("llama_gqa", ["q_proj", "down_proj"])
    steps = parse_pipeline("raise-lora,select-uniform{ratio=0.2 importance=random},shear,dead-code")
    program = trace(model)
    result = PassManager(steps).run(program, named_tensors(model))
    assert len(composed(result.program)) == 4
    assert result.program.parameter_count < 0.85 * program.parameter_count


def test_a_llama_with_adapters_prints_one_line_for_each() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], lora_dropout=0.05)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=18, intermediate_size=34, num_hidden_layers=1, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=8)
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    assert isinstance(model, nn.Module)
    expect_file(AnalysisManager(raised(trace(model))).get(Dump()), "llama_lora.txt")
