"""``data.yaml`` and the rows it names: packed, masked, held out; what is wrong is one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shear_ir.errors import LoadError
from shear_training.data import DataConfig, Source, held_out, load_data, prepare
from shear_training.rows import IGNORED, Rows

WORDS = [*"abcdefghijklmnop", "system", "user", "assistant", "Instruction", "Response", "yes", "no", "#", ":"]
SPECIAL = {"unk_token": "<u>", "bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A word is a token; anything else is ``<u>``."""
    vocab = {word: i for i, word in enumerate(["<u>", "<s>", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**SPECIAL, **options})


def written(folder: Path, name: str, rows: list[Any]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def config(folder: Path, text: str) -> DataConfig:
    (folder / "data.yaml").write_text(text)
    return load_data(folder / "data.yaml")


def texts(count: int, start: int = 0) -> list[dict[str, str]]:
    """Different texts of three words."""
    names = WORDS[:16]
    return [{"text": f"{names[i % 16]} {names[i // 16 % 16]} {names[i // 256]}"} for i in range(start, start + count)]


def words(source: Source, part: str, made: PreTrainedTokenizerFast) -> list[str]:
    rows = getattr(source, part)
    return [made.decode(ids[:n]) for ids, n in zip(rows.ids, rows.lengths, strict=True)]


def test_texts_are_packed_end_to_end_between_their_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\n\nd e\n")
    made = config(tmp_path, "{length: 4, validation: 1, sources: {t: {path: a.txt, validation: a.txt}}}")
    rows = held_out(made, tokenizer())["t"]
    assert (tokenizer().decode(rows.ids[0]), rows.ids.shape) == ("<s> a b c", (1, 4))
    whole = held_out(load_data(tmp_path / "a.txt", whole=True), tokenizer())["a"]
    assert tokenizer().decode(whole.ids[0, : whole.tokens]) == "<s> a b c </s> <s> d e </s>"
    assert int(whole.counted.sum()) == whole.tokens == 9


def test_batches_are_as_long_as_their_longest_row_and_padding_has_no_label(tmp_path: Path) -> None:
    rows = [{"q": "a b", "r": "c"}, {"q": "a", "r": "d e f g"}]
    written(tmp_path, "i.jsonl", rows)
    made = config(tmp_path, "{length: 40, sources: {i: {path: i.jsonl, prompt: q, response: r, validation: i.jsonl}}}")
    held = held_out(made, tokenizer())["i"]
    batch = held.batch([0, 1])
    assert batch["input_ids"].shape == (2, int(held.lengths.max()))
    assert batch["attention_mask"].sum(1).tolist() == held.lengths.tolist()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert "attention_mask" not in held.batch([1])


def answers(folder: Path, text: str, made: PreTrainedTokenizerFast) -> list[str]:
    """What the loss counts in each validation row."""
    rows = next(iter(held_out(config(folder, text), made).values()))
    return [made.decode(ids[counted]) for ids, counted in zip(rows.ids, rows.counted, strict=True)]


@pytest.mark.parametrize(
    ("count", "numbers"), [(1, [0]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (10, range(10)), (99, range(10))]
)
def test_some_rows_lie_evenly_over_all_of_them(count: int, numbers: Sequence[int]) -> None:
    ids = torch.arange(10).view(10, 1).int()
    rows = Rows(ids, torch.ones(10, 1, dtype=torch.bool), torch.ones(10).long())
    assert rows.spread(count).ids.flatten().tolist() == list(numbers)


def test_only_the_response_counts_with_and_without_a_chat_template(tmp_path: Path) -> None:
    written(tmp_path, "i.jsonl", [{"q": "a b", "in": "c", "r": "yes d"}, {"q": "a", "in": "", "r": "no"}])
    text = "{length: 60, sources: {i: {path: i.jsonl, prompt: q, input: in, response: r, validation: i.jsonl}}}"
    assert answers(tmp_path, text, tokenizer()) == ["yes d </s>", "no </s>"]
    assert answers(tmp_path, text, tokenizer(chat_template=TEMPLATE)) == ["yes d </s>", "no </s>"]
    rows = held_out(load_data(tmp_path / "data.yaml"), tokenizer(chat_template=TEMPLATE))["i"]
    assert tokenizer().decode(rows.ids[0, : rows.lengths[0]]) == "user : a b c </s> assistant : yes d </s>"


def test_every_answer_of_a_chat_counts(tmp_path: Path) -> None:
    chat = [("system", "k"), ("user", "a"), ("assistant", "yes b"), ("user", "c"), ("assistant", "no")]
    written(tmp_path, "c.jsonl", [{"m": [{"role": r, "content": c} for r, c in chat]}])
    text = "{length: 60, sources: {c: {path: c.jsonl, messages: m, validation: c.jsonl}}}"
    assert answers(tmp_path, text, tokenizer(chat_template=TEMPLATE)) == ["yes b </s> no </s>"]
    assert answers(tmp_path, text, tokenizer()) == ["yes b </s> no </s>"]


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_answer(tmp_path: Path) -> None:
    chat = [("user", "a"), ("assistant", "yes b"), ("user", "c"), ("assistant", "no")]
    written(tmp_path, "c.jsonl", [{"m": [{"role": r, "content": c} for r, c in chat]}])
    forgetful = "{% set messages = messages[-2:] if not add_generation_prompt else messages[-1:] %}" + TEMPLATE
    text = "{length: 60, sources: {c: {path: c.jsonl, messages: m, validation: c.jsonl}}}"
    assert answers(tmp_path, text, tokenizer(chat_template=forgetful)) == ["no </s>"]


def test_a_long_answer_is_cut_and_a_long_question_left_out(tmp_path: Path) -> None:
    written(tmp_path, "i.jsonl", [{"q": "a", "r": "b " * 50}, {"q": "c " * 50, "r": "d"}])
    text = "{length: 20, sources: {i: {path: i.jsonl, prompt: q, response: r, validation: i.jsonl}}}"
    assert answers(tmp_path, text, tokenizer(chat_template=TEMPLATE)) == [" ".join("b" * 14)]


def test_a_tokenizer_without_end_tokens_will_do(tmp_path: Path) -> None:
    written(tmp_path, "t.jsonl", [{"text": "a b c"}, {"text": "d"}])
    bare = tokenizer(bos_token=None, eos_token=None)
    rows = held_out(config(tmp_path, "{length: 2, sources: {t: {path: t.jsonl, validation: t.jsonl}}}"), bare)["t"]
    assert [bare.decode(ids) for ids in rows.ids] == ["a b", "c d"]


def test_validation_leaves_the_stream_and_takes_its_copies_along(tmp_path: Path) -> None:
    twice = texts(40)
    copies = [{"text": f"  {row['text'].replace(' ', '   ')}\n"} for row in twice]
    written(tmp_path, "one.jsonl", twice)
    written(tmp_path, "two.jsonl", copies + texts(60, start=100))
    text = "{length: 5, validation: 8, sources: {one: {path: one.jsonl}, two: {path: two.jsonl}}}"
    made = prepare(config(tmp_path, text), tokenizer())
    held = {row for source in made.values() for row in words(source, "validation", tokenizer())}
    trained = {row for source in made.values() for row in words(source, "train", tokenizer())}
    assert [len(source.validation) for source in made.values()] == [8, 8]
    assert not held & trained
    # Each of the 40 texts that both files hold is held out in both or in neither.
    assert len(made["one"].train) + len(held & {f"<s> {row['text']} </s>" for row in twice}) == 40


def test_validation_files_are_kept_out_whole_even_where_few_rows_are_measured(tmp_path: Path) -> None:
    written(tmp_path, "t.jsonl", texts(20))
    written(tmp_path, "v.jsonl", texts(10))
    text = "{length: 5, sources: {t: {path: t.jsonl, validation: v.jsonl, validation_rows: 2}}}"
    source = prepare(config(tmp_path, text), tokenizer())["t"]
    assert len(source.validation) == 2
    assert sorted(words(source, "train", tokenizer())) == sorted(f"<s> {r['text']} </s>" for r in texts(10, start=10))


def test_the_same_config_gives_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    written(tmp_path, "t.jsonl", texts(50))
    text = "{{length: 7, validation: 4, seed: {}, sources: {{t: {{path: '*.jsonl', rows: 9}}}}}}"
    digests = [prepare(config(tmp_path, text.format(seed)), tokenizer())["t"].train.digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert len(prepare(load_data(tmp_path / "data.yaml"), tokenizer())["t"].train) == 9


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    import pandas

    frame = pandas.DataFrame(texts(12))
    save = {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(suffix)
    if save is not None:
        save(tmp_path / f"t.{suffix}", index=False)
    else:
        frame.to_json(tmp_path / f"t.{suffix}", orient="records", lines=suffix == "jsonl")
    rows = held_out(load_data(tmp_path / f"t.{suffix}", whole=True), tokenizer())["t"]
    assert rows.tokens == 12 * 5


def test_stages_default_to_one_with_all_sources(tmp_path: Path) -> None:
    one = config(tmp_path, "sources: {a: {path: x.txt}, b: {path: y.txt}}")
    two = config(tmp_path, "{sources: {a: {path: x.txt}}, stages: [{name: p, sources: [a]}, {name: q, sources: [a]}]}")
    assert [(stage.name, stage.sources) for stage in one.road] == [("recovery", ["a", "b"])]
    assert [stage.name for stage in two.road] == ["p", "q"]


def test_the_documented_example_is_valid() -> None:
    made = load_data(Path(__file__).parents[2] / "docs" / "data.yaml")
    assert {source.kind for source in made.sources.values()} == {"text", "instruction", "chat"}
    assert [stage.name for stage in made.road] == ["pretraining", "instructions"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: {}", "sources: dictionary should have at least 1 item"),
        ("- a", "must be a mapping with the key sources"),
        ("sources: [", "is no YAML: "),
        ("{sources: {a: {path: x.txt}}, lenght: 3}", "lenght: extra inputs are not permitted"),
        ("{sources: {a: {path: x.txt}, a: {path: y.txt}}}", "the key a occurs twice"),
        ("{sources: {a: {text: t}}}", "sources.a: give either path, which names files, or hub"),
        ("{sources: {a: {path: x.txt, hub: y}}}", "sources.a: give either path, which names files, or hub"),
        ("{sources: {a: {path: x.txt, split: test}}}", "config and split belong to a hub dataset"),
        ("{sources: {a: {path: x.jsonl, prompt: q}}}", "prompt and response are given together"),
        ("{sources: {a: {path: x.jsonl, input: q}}}", "input goes with prompt and response"),
        ("{sources: {a: {path: x.jsonl, text: t, messages: m}}}", "give one of text, prompt with response, or messages"),
        ("{sources: {a: {path: x.txt}}, length: 1}", "length: input should be greater than or equal to 2"),
        ("{sources: {a: {path: x.txt}}, stages: [{name: s, sources: [b]}]}", "the stage s mixes b, which is no source"),
        ("{sources: {a: {path: x.txt}}, stages: [{name: s, sources: [a, a]}]}", "the stage s names a source twice"),
        ("{sources: {a: {path: x.txt}}, folder: /}", "folder: paths are relative to the folder of the file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(LoadError) as refused:
        config(tmp_path, text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "data.yaml") in str(refused.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "no.jsonl"}, "source s: no file matches "),
        ({"path": "notes.pdf"}, "has none of the extensions .txt, "),
        ({"path": ["few.jsonl", "a.txt"]}, "files of one source have one format, not json and text"),
        ({"path": "broken.jsonl"}, "source s cannot be read: "),
        ({"path": "few.jsonl", "text": "body"}, "source s has no field 'body', only text"),
        ({"path": "blank.jsonl"}, "source s has no usable row"),
        ({"path": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"path": "few.jsonl"}, "source s has 3 rows of 5 tokens, fewer than the 4 that validation asks for"),
        ({"path": "few.jsonl", "validation_rows": 3}, "source s has no usable row left to train on"),
        ({"path": "a.txt", "validation": "few.jsonl", "validation_rows": 9}, "fewer than the 9 that validation asks"),
        ({"path": "few.jsonl", "validation": "few.jsonl"}, "source s has no usable row left to train on"),
        ({"path": "few.jsonl", "validation": "blank.jsonl"}, "source s has no usable row to measure on"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_used_is_named(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    written(tmp_path, "few.jsonl", texts(3))
    written(tmp_path, "blank.jsonl", [{"text": " "}, {"text": None}])
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").write_text("a b c d e f")
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(LoadError) as refused:
        prepare(config(tmp_path, yaml.safe_dump({"length": 5, "validation": 4, "sources": {"s": source}})), tokenizer())
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["no.yaml", "no.jsonl", "data.bin"])
def test_data_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError, match=name):
        load_data(tmp_path / name)


def test_a_file_with_a_star_in_its_name_is_that_file(tmp_path: Path) -> None:
    written(tmp_path, "a[1]*.jsonl", texts(2))
    written(tmp_path, "a1b.jsonl", texts(9))
    assert held_out(load_data(tmp_path / "a[1]*.jsonl", whole=True), tokenizer())["a_1__"].tokens == 10


def test_rows_of_a_part_keep_their_shapes(tmp_path: Path) -> None:
    written(tmp_path, "t.jsonl", texts(6))
    rows = held_out(load_data(tmp_path / "t.jsonl", whole=True), tokenizer())["t"][:1]
    assert rows.ids.dtype == torch.int32
    assert len(rows) == len(rows.lengths) == 1
