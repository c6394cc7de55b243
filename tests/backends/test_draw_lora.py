"""Pictures of models with adapters: one box for base, A and B."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from shear_backends.draw import source
from shear_ir.frontend.export import trace
from shear_ir.manager import PassManager
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.rewrite.raise_lora import RaiseLora
from tests.zoo import MLP


def drawn(model: nn.Module, group: str | None = None) -> str:
    result = PassManager([RaiseLora()]).run(trace(model, {"x": torch.zeros(3, 7, 12)}))
    return source(result.program, result.analyses.get(FindGroups()), group=group)


def boxes(text: str) -> list[str]:
    return [line for line in text.splitlines() if "shape=box, label=<<TABLE" in line]


def adapted() -> nn.Module:
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["gate", "down"])
    return peft.inject_adapter_in_model(config, MLP())


def test_a_lora_layer_is_one_box_that_says_rank_scale_and_dropout() -> None:
    text = drawn(adapted())
    assert [sum(f"<B>{name}</B>" in box for box in boxes(text)) for name in ("gate", "up", "down")] == [1, 1, 1]
    gate = next(box for box in boxes(text) if "<B>gate</B>" in box)
    assert "lora.linear · rank 3 · scale 2.33 · dropout 0.1" in gate
    assert all(f">{row}</FONT>" in gate for row in ("weight", "bias", "A", "B"))
    assert "lora_A" not in "".join(line.partition("tooltip")[0] for line in text.splitlines() if "cluster" in line)


def test_the_picture_of_a_rank_is_its_box_alone() -> None:
    (box,) = boxes(drawn(adapted(), group="rank1"))
    assert "<B>down</B>" in box
    assert "rank1 3" in box
    assert ">weight</FONT>" not in box


def test_two_adapters_are_told_apart_in_their_box() -> None:
    model = adapted()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["gate"]), model, adapter_name="chat")
    layer = model.gate
    assert isinstance(layer, peft.tuners.lora.Linear)
    layer.set_adapter(["default", "chat"])
    gate = next(box for box in boxes(drawn(model)) if "<B>gate</B>" in box)
    assert "rank 3 + 2 · scale 2.33, 4" in gate
    assert all(f">{row}</FONT>" in gate for row in ("A default", "B default", "A chat", "B chat"))


class Parallel(nn.Module):
    """Two adapted maps in one module, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.a, self.b, self.c, self.d = (
            nn.Linear(*sizes, bias=False) for sizes in ((12, 8), (12, 9), (12, 2), (2, 8), (12, 3), (3, 9))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x) + self.b(self.a(x)), self.right(x) + self.d(self.c(x))], -1)


def test_where_a_module_holds_two_each_base_has_its_own_box() -> None:
    text = drawn(Parallel())
    assert [sum(f"<B>{name}</B>" in box for box in boxes(text)) for name in ("left", "right", "a", "d")] == [1, 1, 0, 0]
