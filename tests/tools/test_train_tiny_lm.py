"""The tiny language model's corpus, tokenizer and training loop, on a slice small enough for every test run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train_tiny_lm as tiny

PROGRAM = '''"""Module text."""
# a comment that stays
class Naïve:
    """Only a docstring."""

def double(x):
    """Twice x,
    over two lines."""
    return 2 * x  # "not a docstring"
'''


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, far slower when other work holds the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tiny.Row]]:
    """A few real files, and in each domain one text that three different files share."""
    library = Path(json.__file__).parent.parent
    found: dict[str, list[tiny.Row]] = {domain: [] for domain in tiny.DOMAINS}
    for name, text in islice(tiny.sources(library), 0, 100, 5):
        found["code"] += [tiny.Row(piece, name) for piece in tiny.pieces(tiny.without_docstrings(text))]
        found["docs"] += [tiny.Row(piece, name) for doc in tiny.docstrings(text) for piece in tiny.pieces(doc)]
    found["topics"] = list(tiny.read_topics(library / "pydoc_data" / "topics.py"))
    for domain in tiny.DOMAINS:
        found[domain] += [tiny.Row(f"{domain}: the same text in many files " * 4, f"copy{i}.py") for i in range(60)]
    return found


@pytest.fixture(scope="module")
def corpus(rows: dict[str, list[tiny.Row]]) -> tiny.Corpus:
    return tiny.split(rows)


@pytest.fixture(scope="module")
def tokenizer(corpus: tiny.Corpus) -> PreTrainedTokenizerFast:
    return tiny.train_tokenizer(corpus, vocab=384)


def test_docstrings_leave_and_comments_stay() -> None:
    stripped = tiny.without_docstrings(PROGRAM)
    assert stripped == (
        '# a comment that stays\nclass Naïve:\n    pass\n\ndef double(x):\n    return 2 * x  # "not a docstring"\n'
    )
    assert tiny.docstrings(PROGRAM) == ["Module text.", "Only a docstring.", "Twice x,\nover two lines."]
    assert not list(tiny.docstring_owners(ast.parse(stripped)))


def test_pieces_are_cut_at_blank_lines_and_lose_nothing_but_tables() -> None:
    blocks = [f"block {i}\n" + "word " * 40 for i in range(30)]
    cut = tiny.pieces("\n\n\n".join([*blocks, "9, " * tiny.PIECE_CHARS]))
    assert "\n\n".join(cut) == "\n\n".join(blocks)
    assert max(map(len, cut)) <= tiny.PIECE_CHARS + 2


def test_no_held_out_text_is_in_training(corpus: tiny.Corpus) -> None:
    train = [row for domain in tiny.DOMAINS for row in corpus.train[domain]]
    heldout = [row for domain in tiny.DOMAINS for row in corpus.heldout[domain]]
    texts = [row.text for row in train + heldout]
    assert len(texts) == len(set(texts))
    kept = {part for row in heldout for part in tiny.paragraphs(row.text)}
    assert not any(kept & tiny.paragraphs(row.text) for row in train)
    for domain in tiny.DOMAINS:
        assert corpus.train[domain]
        assert corpus.heldout[domain]
        files = [{row.source for row in half[domain]} for half in (corpus.train, corpus.heldout)]
        assert files[0].isdisjoint(files[1])


def test_the_split_does_not_depend_on_the_order_of_files(rows: dict[str, list[tiny.Row]], corpus: tiny.Corpus) -> None:
    backwards = tiny.split({domain: found[::-1] for domain, found in rows.items()})
    for domain in tiny.DOMAINS:
        assert {row.text for row in backwards.heldout[domain]} == {row.text for row in corpus.heldout[domain]}


def test_every_source_is_relative(corpus: tiny.Corpus) -> None:
    for half in (corpus.train, corpus.heldout):
        assert not any(Path(row.source).is_absolute() for domain in tiny.DOMAINS for row in half[domain])


def test_the_tokenizer_round_trips_after_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn  'naïve ✓ 日本'  # two  spaces \n\n"
    ids = reloaded(text)["input_ids"]
    assert ids[0] == reloaded.bos_token_id == 1
    assert reloaded.decode(ids, skip_special_tokens=True) == text
    assert (reloaded.pad_token_id, reloaded.eos_token_id, len(reloaded)) == (0, 2, 384)


def small_trainer(tokenizer: PreTrainedTokenizerFast, corpus: tiny.Corpus, steps: int) -> tiny.Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
    )
    streams = {d: np.concatenate(tiny.encode(tokenizer, corpus.train[d][:40])) for d in tiny.DOMAINS}
    batches = tiny.Batches(streams, size=3, seed=5, context=32)
    return tiny.Trainer(LlamaForCausalLM(config), batches, peak=3e-3, steps=steps)


def test_a_resumed_run_ends_where_the_whole_run_does(
    tokenizer: PreTrainedTokenizerFast, corpus: tiny.Corpus, tmp_path: Path
) -> None:
    whole = small_trainer(tokenizer, corpus, steps=6)
    losses = [whole.train_step()[0] for _ in range(3)]
    whole.save(tmp_path / "checkpoint.pt")
    losses += [whole.train_step()[0] for _ in range(3)]
    resumed = small_trainer(tokenizer, corpus, steps=6)
    resumed.load(tmp_path / "checkpoint.pt")
    assert [resumed.train_step()[0] for _ in range(3)] == pytest.approx(losses[3:], rel=1e-6)
    assert resumed.progress == 1.0
    assert resumed.tokens_seen == whole.tokens_seen
    assert sum(resumed.tokens_seen.values()) == 6 * 3 * 32


def test_the_loss_starts_at_chance_and_falls(tokenizer: PreTrainedTokenizerFast, corpus: tiny.Corpus) -> None:
    trainer = small_trainer(tokenizer, corpus, steps=36)
    losses = [trainer.train_step()[0] for _ in range(36)]
    assert losses[0] == pytest.approx(np.log(len(tokenizer)), rel=0.03)
    # One batch is three rows of whatever texts this Python brings: the mean of some tells more than the last.
    assert np.mean(losses[-8:]) < losses[0] - 0.4, losses


def test_held_out_loss_predicts_every_token_once(tokenizer: PreTrainedTokenizerFast, corpus: tiny.Corpus) -> None:
    model = small_trainer(tokenizer, corpus, steps=1).model
    tokens = tiny.encode(tokenizer, corpus.heldout["topics"][:3])
    total, count = tiny.heldout_loss(model, tokens, context=32)
    assert count == sum(len(row) - 1 for row in tokens)
    alone = 0.0
    for row in tokens:
        for at in range(0, len(row) - 1, 32):
            ids = torch.from_numpy(row[at : at + 33].astype(np.int64))[None]
            with torch.no_grad():
                log_probs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
            alone -= float(log_probs.gather(-1, ids[:, 1:, None]).sum())
    assert total == pytest.approx(alone, rel=1e-5)


def test_the_schedule_warms_up_and_ends_low() -> None:
    rates = [tiny.learning_rate(progress / 100, peak=1.0) for progress in range(101)]
    assert max(rates) == rates[3] == 1.0
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.03)
