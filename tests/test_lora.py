"""Models with LoRA adapters: the base keeps its groups, the adapters follow it, and their rank is an axis of its own."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_passes.analysis.find_groups import Groups
from tests.roads import Traced, counted, trace
from tests.zoo import FAMILIES

RANK = 5


def adapted(name: str, *targets: str) -> peft.PeftModel:
    """A family with trained-looking adapters: neither of their factors is zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=7, target_modules=list(targets), init_lora_weights=False)
    model = peft.get_peft_model(FAMILIES[name](), config)  # type: ignore[arg-type]
    assert isinstance(model, peft.PeftModel)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Traced:
    return trace(adapted("llama_gqa", "q_proj", "v_proj"))


def of_base(groups: Groups) -> dict[str, tuple[str, int, bool, list[tuple[str, int, str]]]]:
    """Groups by name with their slices in the base model, under the base model's names."""
    return {
        g.name: (
            g.kind,
            g.size,
            g.prunable,
            sorted(
                (s.parameter.removeprefix("base_model.model.").replace(".base_layer", ""), s.dim, groups.show(s.expression))
                for s in g.slices
                if "lora_" not in s.parameter
            ),
        )
        for g in groups
        if g.kind != "lora_rank"
    }  # fmt: skip


def test_adapters_leave_the_groups_of_the_base_alone(llama: Traced) -> None:
    base = sir.groups(sir.trace(FAMILIES["llama_gqa"]()))
    assert of_base(llama.groups) == of_base(base)


def test_every_adapter_has_a_rank_of_its_own(llama: Traced) -> None:
    ranks = [g for g in llama.groups if g.kind == "lora_rank"]
    assert [(g.size, g.prunable, len(g.parameters)) for g in ranks] == [(RANK, True, 2)] * 4
    for group in ranks:
        a, b = sorted(group.parameters)
        assert a.replace("lora_A", "lora_B") == b


def test_rows_of_b_are_in_the_groups_of_the_base_rows(llama: Traced) -> None:
    dims = llama.groups.axes.of_param
    shown = llama.groups.show
    for name in dims:
        if "lora_B" in name:
            base = name.replace("lora_B.default", "base_layer")
            assert shown(dims[name][0]) == shown(dims[base][0])
        if "lora_A" in name:
            assert shown(dims[name][1]) == shown(dims[name.replace("lora_A.default", "base_layer")][1])


@pytest.mark.parametrize("backend", ["graph", "module"])
@pytest.mark.parametrize("kinds", [("kv_head", "ffn"), ("lora_rank",), ("query_group", "lora_rank")])
def test_base_and_adapters_are_cut_alike(llama: Traced, backend: str, kinds: tuple[str, ...]) -> None:
    ratio = 0.01 if kinds == ("lora_rank",) else 0.1
    plan = sir.plan(llama.program, ratio=ratio, kinds=kinds, importance="random")
    small = sir.shear(llama.model, plan, backend=backend)  # type: ignore[arg-type]
    report = sir.verify(llama.model, small, plan)
    assert report.max_abs_diff <= 1e-5
    assert report.moved > 0.05
    assert counted(small) == plan.after.parameters


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", ["c_attn", "c_fc"]),
        pytest.param("phi3", ["qkv_proj", "gate_up_proj"], marks=pytest.mark.thorough),
        ("bert", ["query", "value"]),
    ],
)
def test_adapters_of_fused_projections_follow_them(name: str, targets: list[str]) -> None:
    family = trace(adapted(name, *targets))
    plan = sir.plan(family.program, ratio=0.2, importance="random")
    for backend in ("graph", "module"):
        small = sir.shear(family.model, plan, backend=backend)  # type: ignore[arg-type]
        assert sir.verify(family.model, small, plan).sound


def test_a_sheared_model_merges_into_the_sheared_base(llama: Traced) -> None:
    plan = sir.plan(llama.program, ratio=0.2, importance="random")
    small = sir.shear(llama.model, plan)
    assert isinstance(small, peft.PeftModel)
    expected = sir.verify(llama.model, small, plan)
    merged = small.merge_and_unload()  # type: ignore[operator]
    assert isinstance(merged, nn.Module)
    assert not any("lora" in n for n, _ in merged.named_parameters())
    after = sir.verify(llama.model, merged, plan)
    assert after.sound
    assert expected.moved == pytest.approx(after.moved, rel=1e-3)
