"""A language model with a tokenizer and data on disk, small enough that all of LoRAShear takes a second or two."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

import shear_ir as sir
from shear_tools.workflow.recipe import KnowledgeOptions, Recipe
from shear_tools.workflow.run import Outcome
from shear_training.pruning import Pruning
from shear_training.settings import Recovery
from tests.zoo import build

RECIPE = Recipe(
    KnowledgeOptions(ratios=(0.5,), freeze=0.0),
    Pruning(rank=4, lr=1e-2, warmup=1, periods=2, steps=2, batch=4, save_steps=2, device="cpu"),
    Recovery(rank=4, lr=1e-2, batch=4, rows_per_round=8, epochs=1, max_rounds=2, save_steps=1, device="cpu"),
    {"tuning": {"max_rounds": 1}},
)
"""Five steps of pruning; recovery in three rounds of two steps: two of the stage ``reading``, one of ``tuning``."""

RATIO = 0.3


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter; 41 of them."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, *" .:#\nIRnst"]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_model(folder: Path, seed: int = 0) -> Path:
    """The tiny Llama of the zoo with a tokenizer."""
    build("llama_gqa", seed).save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path, rows: int = 40, **change: Any) -> Path:
    """``data.yaml`` with a source of text and one of instructions, and two stages."""
    folder.mkdir(exist_ok=True)
    letters = string.ascii_lowercase
    texts = [{"text": (letters + letters)[i % 26 :][:18]} for i in range(rows)]
    asked = [
        {"prompt": letters[i % 26], "response": (letters + letters)[i % 26 + 1 :][: 1 + i % 7]} for i in range(rows)
    ]
    for name, found in {"texts": texts, "asked": asked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    document = {
        "length": 48, "validation": 4,
        "sources": {
            "texts": {"path": "texts.jsonl", "text": "text"},
            "asked": {"path": "asked.jsonl", "prompt": "prompt", "response": "response"},
        },
        "stages": [{"name": "reading", "sources": ["texts", "asked"]}, {"name": "tuning", "sources": ["asked"]}],
    }  # fmt: skip
    (folder / "data.yaml").write_text(yaml.safe_dump(document | change, sort_keys=False))
    return folder / "data.yaml"


def write_recipe(path: Path, recipe: Recipe = RECIPE) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.to_json()))))
    return path


def run(out: Path, data: Path, **options: Any) -> Outcome:
    """The same call every time, but for ``options``."""
    model = options.pop("model", None)
    given = {"ratio": RATIO, "recipe": RECIPE, "command": "the command", **options}
    return sir.lorashear(build("llama_gqa") if model is None else model, tokenizer(), out, data=data, **given)  # type: ignore[no-any-return]


def freezing(share: float) -> Recipe:
    return replace(RECIPE, knowledge=replace(RECIPE.knowledge, freeze=share))
