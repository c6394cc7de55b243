"""A folder from a stranger is data: a record that lies is refused and touches nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import shear_ir as sir
from shear_backends.verify.numbers import run
from shear_ir.frontend.inputs import example_inputs
from tests.zoo import build, randomised

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("gpt2")
    return sir.save(sir.shear(model, sir.plan(sir.trace(model), ratio=0.2)), tmp_path / "out").path


def test_a_model_that_was_cast_is_stock_and_the_cast_that_its_computed_buffers_need_is_said(tmp_path: Path) -> None:
    model = build("llama_gqa").to(torch.bfloat16)
    small = sir.shear(model, sir.plan(sir.trace(model), ratio=0.2))
    saved = sir.save(small, tmp_path / "out")
    assert saved.stock
    assert saved.note.startswith(
        "computed buffers such as inv_freq were cast: from_pretrained(path).to(torch.bfloat16)"
    )
    again = type(model).from_pretrained(tmp_path / "out").to(torch.bfloat16)  # type: ignore[attr-defined]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


def randomised_tiny(kind: str, **sizes: Any) -> nn.Module:
    config = transformers.CONFIG_MAPPING[kind](vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    classes = {"marian": transformers.MarianMTModel, "big_bird": transformers.BigBirdForMaskedLM}
    torch.manual_seed(0)
    return randomised(classes[kind](config).eval())


UNEVEN = {
    # Its save_pretrained leaves out the tables of positions, which its class computes.
    "marian": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
               "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
               "decoder_start_token_id": 0, "forced_eos_token_id": None},
    # It puts other attention in the place of its own at the first inputs, where these are short.
    "big_bird": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
                 "block_size": 8, "max_position_embeddings": 64, "sep_token_id": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNEVEN)
def test_what_stock_code_makes_by_itself_is_as_it_was_when_the_model_is_loaded(kind: str, tmp_path: Path) -> None:
    model = randomised_tiny(kind, **UNEVEN[kind])
    feed = example_inputs(model)
    with torch.no_grad():
        run(model, feed)
    program = sir.trace(model)
    plan = sir.plan(program, ratio=0.04, kinds=("kv_head",), only=["*.layer*.0.*"], stock=False)
    small = sir.shear(model, plan)
    saved = sir.save(small, tmp_path / "out")
    assert not saved.stock
    with torch.no_grad():
        assert torch.equal(run(sir.load(saved.path), feed)[0], run(small, feed)[0])
    assert set(model._keys_to_ignore_on_save or ()) == set(small._keys_to_ignore_on_save or ())  # type: ignore[arg-type]


def test_a_parametrised_module_is_no_exchanged_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(
        vocab_size=17, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )).eval()  # fmt: skip
    feed = {"input_values": torch.randn(2, 400)}
    program = sir.trace(model, feed)
    plan = sir.plan(program, ratio=0.05, kinds=("ffn",), only=["*.layers.1.*"], importance="magnitude")
    small = sir.shear(model, plan, inputs=feed)
    saved = sir.save(small, tmp_path / "out")
    assert not saved.stock
    assert torch.equal(run(sir.load(saved.path), feed)[0], run(small, feed)[0])


def attribute(name: str, value: int) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        next(iter(record["attributes"].values()))[name] = value

    return edit


def gather(record: dict[str, Any]) -> None:
    record["gathers"] = [{"module": "transformer", "argument": 0, "dim": 0, "period": 0, "kept": [0]}]


def fit(record: dict[str, Any]) -> None:
    record["fits"] = [{"module": "transformer", "rank": 2, "places": [2], "old": [8], "new": [6]}]


def wider(record: dict[str, Any]) -> None:
    record["fits"] = [{"module": "transformer", "rank": 2, "places": [1], "old": [8], "new": [9]}]


def config(record: dict[str, Any]) -> None:
    record["config"]["n_embd"] = 96


@pytest.mark.parametrize(
    "edit",
    [
        attribute("__class__", 1),
        attribute("__class__.forward", 7),
        attribute("forward", 1),
        attribute("nf", -5),
        attribute("nf", 10**12),
        gather,
        fit,
        wider,
        config,
        lambda record: record.update(format="shear-ir record 9"),
    ],
)
def test_a_record_that_lies_is_refused(saved: Path, edit: Edit) -> None:
    forward = nn.Linear.forward
    file = saved / "shear_ir.json"
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))
    with pytest.raises(sir.ShearError):
        sir.load(saved)
    assert nn.Linear.forward is forward
