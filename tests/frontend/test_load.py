"""Loading by name: every good spec gives its model, every bad one gives one sentence that names what is wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, LlamaConfig, LlamaForCausalLM, LlamaModel

from shear_ir.errors import LoadError
from shear_ir.frontend.load import is_sheared, load_model


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    return tmp_path / "sharded"


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**document, **changes}.items() if v is not None}))


def refusal(spec: str | Path, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load_model(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is LlamaForCausalLM
    assert (loaded.source, loaded.config_only, loaded.model.training) == (tmp_path, False, False)
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_sharded_folder_gives_the_model(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert isinstance(load_model(str(sharded)).model, LlamaForCausalLM)


def test_the_dtype_asked_for_is_that_of_the_weights(saved: Path) -> None:
    assert load_model(str(saved), dtype=torch.bfloat16).model.lm_head.weight.dtype is torch.bfloat16


def test_a_config_alone_gives_a_model_on_the_meta_device(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    edit(saved / "config.json", dtype="bfloat16")
    loaded = load_model(str(saved))
    assert loaded.config_only
    assert {(p.device.type, p.dtype) for p in loaded.model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("cls", [LlamaForCausalLM, LlamaModel])
def test_without_architectures_the_head_is_the_one_in_the_checkpoint(cls: Any, tmp_path: Path) -> None:
    cls(tiny_llama().config).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=None)
    assert type(load_model(str(tmp_path)).model) is cls


def test_a_head_that_the_class_leaves_out_is_reported_as_unused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3
    )  # fmt: skip
    BertForPreTraining(config).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["BertForMaskedLM"])
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is BertForMaskedLM
    assert {name.rpartition(".")[0] for name in loaded.unused} == {"bert.pooler.dense", "cls.seq_relationship"}


def test_nothing_is_printed_or_warned_while_loading(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(saved))
    assert capfd.readouterr() == ("", "")


def test_an_adapter_is_loaded_onto_its_base(saved: Path, tmp_path: Path) -> None:
    adapter = adapter_of(saved, tmp_path)
    loaded = load_model(str(adapter))
    lora = loaded.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert torch.equal(lora, torch.full((24, 5), 0.5))
    assert loaded.source == adapter


def adapter_of(base: Path, tmp_path: Path) -> Path:
    model = get_peft_model(load_model(str(base)).model, LoraConfig(r=5, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.5)
    model.save_pretrained(str(tmp_path / "adapter"))
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    return tmp_path / "adapter"


def test_an_adapter_that_does_not_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    adapter = adapter_of(saved, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    first = min(weights)
    save_file({k: v for k, v in weights.items() if k != first}, adapter / "adapter_model.safetensors")
    assert refusal(adapter) == f"{adapter}/adapter_model.safetensors lacks the tensor {first}"
    save_file({**weights, "base_model.model.other": torch.ones(1)}, adapter / "adapter_model.safetensors")
    assert "base_model.model.other, for which the model has no place" in refusal(adapter)
    save_file({k: v[:, :-1].clone() for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    assert "does not fit its base model" in refusal(adapter)


def test_an_adapter_without_a_usable_base_is_refused(saved: Path, tmp_path: Path) -> None:
    adapter = adapter_of(saved, tmp_path)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "which is an adapter itself" in refusal(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path="/no/such/base")
    assert refusal(adapter) == f"the base model of {adapter} cannot be loaded: there is no folder /no/such/base"
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "does not name its base model" in refusal(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin is not safetensors" in refusal(adapter)


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"there is no folder {tmp_path}/none"
    assert refusal(tmp_path) == f"{tmp_path} holds neither config.json nor adapter_config.json"
    (tmp_path / "config.json").touch()
    assert refusal(tmp_path / "config.json").endswith("is a file: give the folder that holds the model's config.json")
    assert refusal("").endswith("holds neither config.json nor adapter_config.json")


def test_a_hub_name_that_cannot_be_had_is_refused() -> None:
    assert refusal("nobody/nothing") == (
        "there is no folder nobody/nothing, and no model of that name could be had from the Hugging Face Hub: "
        "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing "
        "traffic has been disabled"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "config.json is not JSON: "),
        ("\xff", "config.json is not JSON: "),
        ("[]", "config.json is not a JSON object"),
        ("{}", "config.json cannot be used: Unrecognized model"),
        ('{"model_type": "nonesuch"}', "config.json cannot be used: The checkpoint you are trying to load has model type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json cannot be used: "),
        ('{"model_type": "llama", "hidden_size": -3}', "config.json cannot be used: "),
        ('{"model_type": "llama", "num_hidden_layers": "x"}', "config.json cannot be used: "),
        ('{"model_type": "gpt2", "n_head": 5}', "GPT2LMHeadModel cannot be built from "),
        ('{"model_type": "llama", "architectures": ["BertForMaskedLM"]}', "names BertForMaskedLM, which is no llama model"),
        ('{"model_type": "llama", "transformers_weights": "../x.safetensors"}', "names the weights '../x.safetensors'"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert says in refusal(tmp_path)


def test_code_of_the_folder_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": mapped}))
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "class OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
        "class OwnModel(PreTrainedModel):\n    config_class = OwnConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n        self.one = nn.Linear(3, 5)\n"
        "        self.post_init()\n"
    )
    assert refusal(tmp_path) == f"{tmp_path} brings its own code, which runs only if you trust it: trust_remote_code"
    assert type(load_model(str(tmp_path), trust_remote_code=True).model).__name__ == "OwnModel"


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    assert refusal(saved) == (
        f"{saved}/pytorch_model.bin is not safetensors, and other weights are not read: "
        "save the model as model.safetensors first"
    )


def test_weights_under_another_name_are_not_taken_for_a_config_alone(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "weights.safetensors")
    assert refusal(saved).endswith("is there, but neither model.safetensors nor an index that names it")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"?" * (len(data) - 8),
        lambda data: data + b"more",
    ],
)
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(saved).startswith(f"{file} is not a whole safetensors file: ")


def test_weights_that_do_not_fit_the_config_are_refused(saved: Path) -> None:
    edit(saved / "config.json", num_hidden_layers=3)
    assert (
        refusal(saved) == f"{saved} lacks the tensor model.layers.2.input_layernorm.weight that LlamaForCausalLM needs"
    )
    edit(saved / "config.json", num_hidden_layers=1)
    assert refusal(saved).startswith(f"{saved} holds the tensor model.layers.1.")
    edit(saved / "config.json", num_hidden_layers=2, intermediate_size=38)
    assert refusal(saved) == (
        f"{saved}: model.layers.0.mlp.down_proj.weight is [24, 40], but config.json makes it [24, 38]"
    )


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("../outside.safetensors", "lies outside of the folder"),
        ("/etc/hostname", "lies outside of the folder"),
        ("link.safetensors", "lies outside of the folder"),
        ("missing.safetensors", "which is not there"),
        ("other.safetensors", "holds model.embed_tokens.weight, which it does not"),
    ],
)
def test_an_index_that_names_a_wrong_shard_is_refused(shard: str, says: str, sharded: Path) -> None:
    save_file({"x": torch.ones(1)}, sharded.parent / "outside.safetensors")
    save_file({"x": torch.ones(1)}, sharded / "other.safetensors")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    index = sharded / "model.safetensors.index.json"
    edit(index, weight_map={**json.loads(index.read_text())["weight_map"], "model.embed_tokens.weight": shard})
    assert re.search(f"model.safetensors.index.json (names the shard|says that) {shard}.*{says}", refusal(sharded))


def test_an_index_that_is_no_index_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text('{"weight_map": ["a"]}')
    assert refusal(sharded) == f"{index} has no weight_map from tensor names to file names"
    index.write_text("nonsense")
    assert refusal(sharded).startswith(f"{index} is not JSON: ")


def test_a_snapshot_in_the_hub_cache_may_link_to_its_blobs(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    sharded.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert isinstance(load_model(str(snapshot)).model, LlamaForCausalLM)


FACTORIES = """
from torch import nn
def model(): return nn.Linear(3, 5)
def number(): return 5
def fails(): raise ValueError("no data here")
instance = nn.Linear(3, 5)
text = "text"
class Holder: model = staticmethod(model)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories_of_test_load.py").write_text(FACTORIES)
    (tmp_path / "broken_in_test_load.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", ["model", "instance", "Holder.model"])
@pytest.mark.usefixtures("here")
def test_a_factory_gives_the_model_it_returns(name: str) -> None:
    loaded = load_model(f"factories_of_test_load:{name}", dtype=torch.float64)
    assert isinstance(loaded.model, nn.Linear)
    assert (loaded.model.weight.dtype, loaded.source, loaded.config_only) == (torch.float64, None, False)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("no_such_module.at_all:model", "there is no module no_such_module, which no_such_module.at_all:model names"),
        ("broken_in_test_load:model", "importing broken_in_test_load failed: No module named 'no_such_dependency'"),
        (
            "factories_of_test_load:other",
            "factories_of_test_load has no other, which factories_of_test_load:other names",
        ),
        ("factories_of_test_load:text", "factories_of_test_load:text is str, not a function that returns a model"),
        ("factories_of_test_load:number", "factories_of_test_load:number returns int, not a torch.nn.Module"),
        ("factories_of_test_load:fails", "factories_of_test_load:fails failed: no data here"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_factory_that_gives_no_model_is_refused(spec: str, says: str) -> None:
    assert refusal(spec) == says


def test_only_a_folder_that_says_it_is_not_stock_is_sheared(tmp_path: Path) -> None:
    assert not is_sheared(tmp_path)
    (tmp_path / "shear_ir.json").write_text('{"stock": true}')
    assert not is_sheared(tmp_path)
    (tmp_path / "shear_ir.json").write_text('{"stock": false}')
    assert is_sheared(tmp_path)
