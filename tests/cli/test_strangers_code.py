"""No file chooses code to run: beside each kind of it lies a module in the current folder that must not be imported."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from shear_ir.errors import LoadError
from shear_ir.frontend.load import load_model
from shear_passes.importance import criterion
from shear_tools.workflow.recipe import load_recipe
from tests.cli.conftest import Shear
from tests.workflow.tiny import write_model

# It is run when it is imported, and so it is when one of its functions is called.
HOSTILE = """
from pathlib import Path
Path(__file__).with_name("marker").write_text("imported")
from shear_ir.axes import *
make = score = Model = Tokenizer = builder = lambda *a, **k: None
"""


@contextmanager
def hostile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, first on the path of imports as under ``python -m``, with a module that tells of itself."""
    (folder / "evil.py").write_text(HOSTILE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    assert not (folder / "marker").exists(), "code of a file ran"
    assert "evil" not in sys.modules


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with hostile(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "readable"
    write_model(folder)
    return folder


@pytest.fixture
def adapter(here: Path, llama: Path) -> Path:
    """The folder ``ad`` with an adapter of the tiny Llama."""
    model = get_peft_model(load_model(str(llama)).model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(here / "ad"))
    edit(here / "ad/adapter_config.json", base_model_name_or_path=str(llama))
    return here / "ad"


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def edit(path: Path, **change: Any) -> None:
    write(path, {**json.loads(path.read_text()), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["evil:Model"]},
        {"architectures": ["evil.Model"]},
        {"architectures": ["evil"]},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:make"},
        {"_attn_implementation": {"": "evil/kernel"}},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"model_type": "evil:Model"},
        {"transformers_weights": "evil.py"},
    ],
    ids=str,
)
def test_a_config_imports_nothing(here: Path, llama: Path, shear: Shear, change: dict[str, Any]) -> None:
    shutil.copytree(llama, here / "model")
    edit(here / "model/config.json", **change)
    ran = shear("groups", "model")
    # A class that transformers does not have is looked for by the tensors that are there.
    assert ran.code == 0 if "architectures" in change else ran.sentence


@pytest.mark.parametrize("shard", ["evil.py", "evil:make", "../evil.py"])
def test_an_index_imports_nothing(here: Path, config_only: Path, shear: Shear, shard: str) -> None:
    shutil.copytree(config_only, here / "model")
    shutil.copy(here / "evil.py", here / "model/evil.py")
    write(here / "model/model.safetensors.index.json", {"weight_map": {"lm_head.weight": shard}})
    assert "evil" in shear("groups", "model").sentence


@pytest.mark.parametrize("base", ["evil:make", "evil:Model.make", "./evil.py", "file:evil.py"])
@pytest.mark.parametrize("command", ["groups", "prune", "eval", "project"])
def test_an_adapter_imports_nothing(
    here: Path, adapter: Path, pruned: Path, shear: Shear, base: str, command: str
) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    (here / "data.yaml").write_text("sources: {a: {path: a.txt}}")
    more = {"prune": ["--ratio", "0.2", "-o", "out"], "eval": ["--data", "data.yaml"],
            "project": ["--plan", pruned, "-o", "out"]}.get(command, [])  # fmt: skip
    said = f"the base model of ad cannot be loaded: there is no folder {base}"
    assert shear(command, "ad", *more).sentence == said
    assert shear(command, "ad", *more, "--trust-remote-code").sentence == said


def test_an_adapter_has_peft_import_nothing(adapter: Path, shear: Shear) -> None:
    edit(adapter / "adapter_config.json", megatron_config={}, megatron_core="evil")
    assert "names code to import (megatron_core)" in shear("groups", "ad").sentence


def test_a_plan_imports_nothing(here: Path, llama: Path, pruned: Path, shear: Shear) -> None:
    plan = json.loads((pruned / "plan.json").read_text())
    write(
        here / "plan.json",
        {
            **plan,
            "model": "evil:make",
            "options": {"importance": "evil:score", "then": {"importance": "custom{path=evil:score}"}},
        },
    )
    assert shear("prune", llama, "--plan", "plan.json", "-o", "out").code == 0


@pytest.mark.parametrize("name", ["evil:make", "evil", "evil.Model", "LlamaModel.evil"])
def test_a_record_imports_nothing(here: Path, pruned: Path, shear: Shear, name: str) -> None:
    shutil.copytree(pruned, here / "small")
    edit(here / "small/shear_ir.json", model_class=name, stock=False)
    assert "give the dense model" in shear("groups", "small").sentence


def test_the_config_of_a_record_imports_nothing(here: Path, pruned: Path, shear: Shear) -> None:
    shutil.copytree(pruned, here / "small")
    record = json.loads((here / "small/shear_ir.json").read_text())
    edit(here / "small/shear_ir.json", stock=False, config={**record["config"], "attn_implementation": "evil/kernel"})
    assert "code that runs only if you trust it" in shear("groups", "small").sentence


NAMES = [
    "evil:score", "evil:Model.make", "evil:score{p=1}", "evil:score{}", "custom{path=evil:score}", "custom{path=evil}",
    'custom{path="evil:score"}', 'custom{path="evil\\u003ascore"}', "evil", "evil.score",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["lorashear", "recover"])
def test_a_recipe_imports_nothing(here: Path, llama: Path, shear: Shear, name: str, command: str) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump({"pruning": {"criteria": {name: 1.0}}}))
    (here / "data.yaml").write_text("sources: {a: {path: a.txt}}")
    more = ["--dense", llama] if command == "recover" else []
    ran = shear(command, llama, *more, "--data", "data.yaml", "--recipe", "recipe.yaml", "-o", "out")
    assert "runs only if you trust it" in ran.sentence or "no saliency criterion" in ran.sentence


@pytest.mark.parametrize("hub", ["evil", "./evil.py", "evil.py", "pandas", "json", "folder", "../folder", "a:b", "/"])
def test_data_import_nothing(here: Path, readable: Path, shear: Shear, hub: str) -> None:
    (here / "folder").mkdir()
    (here / "folder/folder.py").write_text(HOSTILE)
    (here / "evil").mkdir()
    (here / "data.yaml").write_text(yaml.safe_dump({"sources": {"a": {"hub": hub}}}))
    assert "is no name of a dataset on the hub" in shear("eval", readable, "--data", "data.yaml").sentence


def test_knowledge_imports_nothing(here: Path, llama: Path, shear: Shear) -> None:
    group = {
        "group": "evil:score",
        "kind": "evil:score",
        "module": "evil:make",
        "size": 1,
        "deviations": [1.0],
        "frozen": False,
    }
    write(
        here / "k.json",
        {
            "format": "shear-ir knowledge 1",
            "digest": "evil:make",
            "loss": 1.0,
            "ratios": [0.5],
            "share": 0.0,
            "groups": [group],
        },
    )
    ran = shear("prune", llama, "--ratio", "0.2", "--allocation", "by-knowledge", "--knowledge", "k.json", "-o", "out")
    assert "another model" in ran.sentence


@pytest.mark.parametrize(
    "change",
    [{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, {"tokenizer_class": "evil:Tokenizer"}, {"tokenizer_class": "evil"},
     {"auto_map": {"AutoTokenizer": ["evil/evil--evil.Tokenizer", None]}, "tokenizer_class": "Evil"}],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_imports_nothing(here: Path, readable: Path, shear: Shear, change: dict[str, Any]) -> None:
    shutil.copytree(readable, here / "model")
    shutil.copy(here / "evil.py", here / "model/evil.py")
    edit(here / "model/tokenizer_config.json", **change)
    (here / "a.txt").write_text("a b c")
    ran = shear("eval", "model", "--data", "a.txt")
    # A class that is not there is passed over where the files are enough for a tokenizer.
    assert ran.code == 0 or "tokenizer" in ran.sentence


def test_a_card_imports_nothing(here: Path, llama: Path, shear: Shear) -> None:
    shutil.copytree(llama, here / "model")
    (here / "model/README.md").write_text("---\nlibrary_name: evil\nbase_model: !!python/name:evil.make\n---\n")
    assert shear("groups", "model").code == 0


def test_what_the_command_line_names_is_imported(
    tmp_path: Path, llama: Path, shear: Shear, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_on_the_command_line.py").write_text(
        "def score(group, evidence): return list(range(group.size))\n"
    )
    monkeypatch.chdir(tmp_path)
    ran = shear("prune", llama, "--ratio", "0.2", "--importance", "mine_on_the_command_line:score", "-o", "out")
    assert ran.code == 0
    (tmp_path / "recipe.yaml").write_text("pruning: {criteria: {'mine_on_the_command_line:score': 1.0}}")
    with pytest.raises(LoadError, match="runs only if you trust it: trust_remote_code"):
        load_recipe(tmp_path / "recipe.yaml")
    read = load_recipe(tmp_path / "recipe.yaml", trust_remote_code=True)
    assert list(read.pruning.criteria) == ["mine_on_the_command_line:score"]
    assert criterion("mine_on_the_command_line:score").path == "mine_on_the_command_line:score"  # type: ignore[attr-defined]
