"""What is written is read again before it appears: it loads as it is, or one sentence says why it was not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.verify.numbers import run
from shear_ir.frontend.inputs import example_inputs
from tests.zoo import build, randomised


def uneven(name: str = "llama_gqa", only: str = "*.layers.0.*", kind: str = "float32") -> Any:
    """A sheared model whose first layer alone lost channels, which no config says."""
    model = build(name).to(getattr(torch, kind))
    return sir.shear(model, sir.plan(sir.trace(model), ratio=0.05, kinds=("ffn",), only=[only], importance="random"))


def even(kind: str = "float32", name: str = "llama_gqa") -> Any:
    model = build(name).to(getattr(torch, kind))
    plan = sir.plan(sir.trace(model), ratio=0.1, kinds=("ffn",), importance="random", round_to=4)
    return sir.shear(model, plan)


def equal(a: nn.Module, b: nn.Module, feed: dict[str, Tensor] | None = None) -> bool:
    feed = example_inputs(a) if feed is None else feed
    with torch.no_grad():
        return all(torch.equal(x, y) for x, y in zip(run(a, feed), run(b, feed), strict=True))


@pytest.mark.parametrize(("name", "only"), [("llama_gqa", "*.layers.0.*"), ("gpt2", "*.h.0.*")])
def test_the_record_tells_todays_shapes(name: str, only: str, tmp_path: Path) -> None:
    small = uneven(name, only)
    more = small.config.vocab_size + 7
    small.resize_token_embeddings(more)
    assert not sir.save(small, tmp_path / "out").stock
    again: Any = sir.load(tmp_path / "out")
    assert again.config.vocab_size == more
    assert again.get_input_embeddings().num_embeddings == again.lm_head.out_features == more
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (name == "gpt2")
    assert equal(small, again)
    assert sir.save(again, tmp_path / "twice").path.is_dir()


def test_todays_config_is_read_again(tmp_path: Path) -> None:
    small = uneven()
    small.config.pad_token_id, small.generation_config.eos_token_id = 5, 7
    sir.save(small, tmp_path / "out")
    again: Any = sir.load(tmp_path / "out")
    assert (again.config.pad_token_id, again.generation_config.eos_token_id) == (5, 7)


@pytest.mark.parametrize("make", [uneven, even])
def test_a_layer_that_was_taken_out_by_hand_is_missed_before_anything_appears(make: Any, tmp_path: Path) -> None:
    small = make()
    small.model.layers = small.model.layers[:-1]
    with pytest.raises(sir.SaveError, match=r"changed after it was sheared: model\.layers\.1\.\S+ is gone; undo that"):
        sir.save(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_the_config_misses_as_well_is_no_loss(tmp_path: Path) -> None:
    small = even()
    small.model.layers = small.model.layers[:-1]
    small.config.num_hidden_layers -= 1
    assert sir.save(small, tmp_path / "out").stock
    assert equal(small, type(small).from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize("make", [uneven, even])
def test_wrappers_are_taken_off(make: Any, wrap: Any, tmp_path: Path) -> None:
    small = make()
    sir.save(wrap(small), tmp_path / "out")
    again = sir.load(tmp_path / "out")
    assert type(again) is type(small)
    assert equal(small, again)


def test_a_compiled_layer_inside_is_refused(tmp_path: Path) -> None:
    small = even()
    small.model.layers[0] = torch.compile(small.model.layers[0])
    with pytest.raises(sir.SaveError, match=r"model\.layers\.0\.\S+ is gone"):
        sir.save(small, tmp_path / "out")


def test_a_stock_model_that_was_read_by_its_class_is_saved_as_it_is(tmp_path: Path) -> None:
    small = even()
    sir.save(small, tmp_path / "out")
    read = type(small).from_pretrained(tmp_path / "out")
    again = sir.save(read, tmp_path / "again")
    assert again.stock
    assert "It brought no record of what was cut from it" in (tmp_path / "again/README.md").read_text()
    assert equal(small, sir.load(tmp_path / "again"))
    assert sir.save(sir.load(tmp_path / "again"), tmp_path / "again", force=True).stock
    with pytest.raises(sir.SaveError, match="this model has not been sheared: save it as you would any other"):
        sir.save(nn.Linear(2, 3), tmp_path / "other")


@pytest.mark.parametrize("kind", ["float64", "bfloat16"])
@pytest.mark.parametrize("make", [uneven, even])
def test_what_was_cast_is_read_as_it_was(make: Any, kind: str, tmp_path: Path) -> None:
    small = make(kind=kind)
    assert sir.save(small, tmp_path / "out").stock == (make is even)
    assert equal(small, sir.load(tmp_path / "out"))


def test_a_function_that_no_file_tells_is_refused(tmp_path: Path) -> None:
    small = even()
    small.model.layers[0].self_attn.scaling *= 2
    with pytest.raises(sir.SaveError, match=r"outputs differ by \S+ \(model\.layers\.0\.self_attn\.scaling is"):
        sir.save(small, tmp_path / "scaled")
    small.model.layers[0].self_attn.scaling /= 2
    small.model.layers[0].mlp.register_forward_hook(lambda module, given, made: 2 * made)
    with pytest.raises(sir.SaveError, match="outputs differ by"):
        sir.save(small, tmp_path / "hooked")


def test_a_model_whose_inputs_nobody_can_guess_is_compared_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=44, num_mel_bins=10, max_source_positions=19,
        max_target_positions=26, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ))  # fmt: skip
    model = randomised(model.eval())
    feed = {"input_features": torch.randn(3, 10, 38), "decoder_input_ids": torch.randint(3, 60, (3, 7))}
    plan = sir.plan(sir.trace(model, feed), ratio=0.1, kinds=("ffn",), importance="random")
    small = sir.shear(model, plan, inputs=feed)
    assert sir.save(small, tmp_path / "out").stock
    assert equal(small, type(small).from_pretrained(tmp_path / "out"), feed)


def test_a_generation_config_that_its_class_refuses_is_one_sentence(tmp_path: Path) -> None:
    small = even()
    small.generation_config.temperature = 0.3
    with pytest.raises(sir.SaveError, match="LlamaForCausalLM refuses to be saved: GenerationConfig is invalid"):
        sir.save(small, tmp_path / "out")


class Tied(nn.Module):
    """A plain module with one tensor under two names, and a buffer that sees a part of a parameter."""

    def __init__(self, vocab: int = 31, hidden: int = 12, ffn: int = 20) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("seen", self.tokens.weight.data[:3])

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.tokens(ids)
        made: Tensor = self.head(hidden + self.down(self.up(hidden).relu()))
        return made


IDS = {"ids": torch.arange(21).reshape(3, 7)}


def small_tied() -> Any:
    model = Tied().eval()
    plan = sir.plan(sir.trace(model, IDS), ratio=0.1, kinds=("ffn",), importance="random")
    return sir.shear(model, plan, inputs=IDS)


def test_one_tensor_under_two_names_is_one_again(tmp_path: Path) -> None:
    small = small_tied()
    sir.save(small, tmp_path / "out")
    again: Any = sir.load(tmp_path / "out", Tied())
    assert again.head.weight is again.tokens.weight
    assert equal(small, again, IDS)


def test_a_plain_module_is_read_again_by_its_skeleton(tmp_path: Path) -> None:
    small = small_tied()
    more = nn.Parameter(torch.randn(37, 12))
    small.tokens.weight = small.head.weight = more
    small.tokens.num_embeddings = small.head.out_features = 37
    sir.save(small, tmp_path / "resized")
    again: Any = sir.load(tmp_path / "resized", Tied())
    assert again.tokens.num_embeddings == 37
    assert equal(small, again, IDS)
    small.down = nn.Sequential(small.down)
    with pytest.raises(sir.SaveError, match=r"Tied cannot be saved .*: down\.weight is gone"):
        sir.save(small, tmp_path / "changed")
