"""Train a small, real Llama on the text that every Python installation carries.

Experiments on structured pruning need a model that has learned something: a random one has no unit worth keeping.
The corpus has three separate domains, read from source files with ``ast`` and never by importing them:

``code``    the standard library's sources, comments kept, docstrings removed
``docs``    the docstrings of the standard library, torch, numpy and transformers
``topics``  the language reference in ``pydoc_data.topics``

Whole files (for ``topics``: whole topics) are held out, chosen by the hash of their name, so every machine with the
same versions makes the same split whatever the seed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("code", "docs", "topics")
HELD_OUT_SHARE = {"code": 0.05, "docs": 0.04, "topics": 0.08}
# Topics are some 130 k tokens: at this weight a run of 6 M tokens reads them about five times, the others at most once.
DOMAIN_WEIGHTS = {"code": 0.46, "docs": 0.44, "topics": 0.10}
DOC_PACKAGES = ("torch", "numpy", "transformers")
LICENCES = {"python": "PSF-2.0", "torch": "BSD-3-Clause", "numpy": "BSD-3-Clause", "transformers": "Apache-2.0"}
# Tests, tables (codecs), the topics themselves (they are a domain), and files that record where Python was built.
SKIPPED_PARTS = re.compile(r"^(tests?|idle_test|encodings|pydoc_data|site-packages|config-.*|_sysconfigdata.*)$")
PIECE_CHARS = 2400
SMALLEST_ROW = 64
LONG_PARAGRAPH = 120
HELD_OUT_BYTES = 150_000
TRAIN_SAMPLE_BYTES = 700_000
TOKENIZER_BYTES = 6_000_000
VOCAB = 2048
CONTEXT = 256
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ASSET_LIMIT = 12_000_000
CHECKPOINT_SECONDS = 120.0
EVALUATE_SECONDS = 400.0

console = Console()


@dataclass(frozen=True)
class Row:
    """One piece of text, at most a few kB, and the file it is from, named relative to its library's folder."""

    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Rows by domain. No text is in both halves, and none twice in one."""

    train: dict[str, list[Row]]
    heldout: dict[str, list[Row]]

    def fingerprint(self) -> str:
        """A short hash of every row of both halves, in order."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def share(name: str) -> float:
    """Where a name falls in [0, 1): the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def parse(source: str) -> ast.Module:
    """The syntax tree, without the warnings that old escapes in other people's strings give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def docstring_owners(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every node of the tree that has a docstring."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            yield node


def without_docstrings(source: str) -> str:
    """The same program without its docstrings; comments and layout stay. A body left empty becomes ``pass``.

    Raises ``SyntaxError`` for a source that does not parse, before or after.
    """
    lines = source.encode().splitlines(keepends=True)  # columns of the syntax tree count bytes
    owners = sorted(docstring_owners(parse(source)), key=lambda owner: owner.body[0].lineno, reverse=True)
    for owner in owners:
        doc = owner.body[0]
        first, last = doc.lineno - 1, (doc.end_lineno or doc.lineno) - 1
        filler = b"pass" if len(owner.body) == 1 else b""
        left = lines[first][: doc.col_offset] + filler + lines[last][doc.end_col_offset :]
        lines[first : last + 1] = [left] if left.strip() else []
    stripped = b"".join(lines).decode()
    parse(stripped)
    return stripped


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, cleaned of indentation, in the order of the file."""
    owners = sorted(docstring_owners(parse(source)), key=lambda owner: owner.body[0].lineno)
    return [text for owner in owners if (text := ast.get_docstring(owner))]


def pieces(text: str, limit: int = PIECE_CHARS) -> list[str]:
    """Cut a text at blank lines into pieces of about ``limit`` characters, better before an unindented line.

    Paragraphs above twice the limit are tables and are left out.
    """
    done: list[str] = []
    piece = ""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        if len(paragraph) > 2 * limit:
            continue
        full = len(piece) + len(paragraph) > limit
        if piece and (full or (len(piece) > limit // 2 and not paragraph[:1].isspace())):
            done.append(piece)
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    return [row for row in [*done, piece] if len(row) >= SMALLEST_ROW]


def sources(root: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(relative name, text)`` of each Python file under a folder, sorted by name, without tests and tables."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(SKIPPED_PARTS.match(part) for part in (*relative.parts[:-1], relative.stem)):
            continue
        try:
            yield prefix + relative.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def package_folder(name: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {name} is not installed; the docs domain reads its docstrings")
    return Path(spec.submodule_search_locations[0])


def read_topics(path: Path) -> Iterator[Row]:
    """The topics of ``pydoc_data/topics.py``, a literal dict from topic to text."""
    for statement in parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign):
            for topic, text in ast.literal_eval(statement.value).items():
                yield from (Row(piece, f"pydoc_data/topics.py#{topic}") for piece in pieces(text))


def read_domains() -> dict[str, list[Row]]:
    """All rows of this Python installation by domain, before the split."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, list[Row]] = {domain: [] for domain in DOMAINS}
    rows["topics"] = list(read_topics(library / "pydoc_data" / "topics.py"))
    files = [(name, text, True) for name, text in sources(library)]
    for package in DOC_PACKAGES:
        files += [(name, text, False) for name, text in sources(package_folder(package), f"{package}/")]
    for name, text, is_library in files:
        try:
            stripped, docs = without_docstrings(text) if is_library else "", docstrings(text)
        except SyntaxError:
            continue
        rows["code"] += [Row(piece, name) for piece in pieces(stripped)]
        rows["docs"] += [Row(piece, name) for doc in docs for piece in pieces(doc)]
    return rows


def paragraphs(text: str) -> set[str]:
    """The paragraphs long enough that two texts do not share them by chance."""
    return {part for part in text.split("\n\n") if len(part) >= LONG_PARAGRAPH}


def split(rows: Mapping[str, Sequence[Row]]) -> Corpus:
    """Hold out whole files by the hash of their name; drop exact duplicates.

    A training row leaves when a held-out row has the same text or shares a long paragraph with it, in any domain.
    """
    seen: set[str] = set()
    heldout: dict[str, list[Row]] = {domain: [] for domain in DOMAINS}
    train: dict[str, list[Row]] = {domain: [] for domain in DOMAINS}

    def keep(target: dict[str, list[Row]], want_heldout: bool) -> None:
        for domain in DOMAINS:
            for row in rows.get(domain, ()):
                if (share(f"{domain}/{row.source}") < HELD_OUT_SHARE[domain]) is not want_heldout or row.text in seen:
                    continue
                if not want_heldout and not paragraphs(row.text).isdisjoint(guarded):
                    continue
                seen.add(row.text)
                target[domain].append(row)

    guarded: set[str] = set()
    keep(heldout, want_heldout=True)
    guarded |= {part for domain in DOMAINS for row in heldout[domain] for part in paragraphs(row.text)}
    keep(train, want_heldout=False)
    return Corpus(train, heldout)


def sample(rows: Sequence[Row], limit: int) -> list[Row]:
    """Rows in the order of their hash, so from many files, until their jsonl lines reach ``limit`` bytes."""
    chosen: list[Row] = []
    size = 0
    for row in sorted(rows, key=lambda row: share(row.text)):
        size += len(json_line(row).encode())
        if size > limit:
            break
        chosen.append(row)
    return chosen


def json_line(row: Row) -> str:
    """One line of a jsonl file."""
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def train_tokenizer(corpus: Corpus, vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training rows, as much of each domain as its weight says; ``<s>`` is put in front."""
    texts: list[str] = []
    for domain in DOMAINS:
        texts += [row.text for row in sample(corpus.train[domain], int(TOKENIZER_BYTES * DOMAIN_WEIGHTS[domain]))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, rows: Iterable[Row]) -> list[npt.NDArray[np.int32]]:
    """``<s> text </s>`` of each row, as token ids."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    eos = [backend.token_to_id(EOS)]
    encoded = backend.encode_batch([row.text for row in rows])
    return [np.array(one.ids + eos, dtype=np.int32) for one in encoded]


def model_config(vocab: int = VOCAB) -> LlamaConfig:
    """The shape: about 3.9 M parameters; every size that is pruned differs from every other one.

    At ratios 0.2 and 0.5, ffn 640 becomes 512 and 320, hidden 192 about 152 and 96, 4 kv heads 3 and 2. The output
    matrix is not tied to the embedding: pruning then meets two readers of the hidden axis with values of their own.
    """
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@dataclass
class Batches:
    """Training batches. Batch ``step`` depends on the seed and the step alone, so a resumed run reads the same ones."""

    streams: dict[str, npt.NDArray[np.int32]]
    size: int
    seed: int
    context: int = CONTEXT

    def __call__(self, step: int) -> tuple[Tensor, list[str]]:
        """Tokens of shape ``(size, context + 1)`` and the domain of each row."""
        random = np.random.default_rng((self.seed, step))
        weights = np.array([DOMAIN_WEIGHTS[domain] for domain in self.streams])
        domains = [str(name) for name in random.choice(list(self.streams), self.size, p=weights / weights.sum())]
        rows = []
        for domain in domains:
            start = int(random.integers(0, len(self.streams[domain]) - self.context - 1))
            rows.append(self.streams[domain][start : start + self.context + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64)), domains


def heldout_loss(
    model: LlamaForCausalLM, tokens: Sequence[npt.NDArray[np.int32]], context: int = CONTEXT
) -> tuple[float, int]:
    """Summed negative log likelihood in nats, and the number of predicted tokens.

    Each row is cut into windows of ``context`` inputs; every token but the first of a row is predicted exactly once,
    from what its window holds before it.
    """
    windows = [row[at : at + context + 1] for row in tokens for at in range(0, len(row) - 1, context)]
    windows.sort(key=len)
    device = model.device
    total, count = 0.0, 0
    model.train(False)
    with torch.inference_mode():
        for at in range(0, len(windows), 16):
            batch = windows[at : at + 16]
            padded = np.full((len(batch), max(map(len, batch))), -100, dtype=np.int64)
            for index, window in enumerate(batch):
                padded[index, : len(window)] = window
            ids = torch.from_numpy(padded).to(device)
            # Padding stands to the right, where causal attention never looks from a real token.
            logits = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits.float()
            total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += int((ids[:, 1:] >= 0).sum())
    model.train()
    return total, count


def heldout_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Mapping[str, Sequence[Row]]
) -> dict[str, dict[str, float | int]]:
    """Per domain: tokens, nats per token, perplexity, and bits per byte of the UTF-8 text (``</s>`` is counted too)."""
    report: dict[str, dict[str, float | int]] = {}
    for domain, texts in rows.items():
        total, count = heldout_loss(model, encode(tokenizer, texts))
        size = sum(len(row.text.encode()) for row in texts)
        report[domain] = {
            "rows": len(texts),
            "tokens": count,
            "bytes": size,
            "nll_per_token": round(total / count, 5),
            "perplexity": round(math.exp(total / count), 4),
            "bits_per_byte": round(total / math.log(2) / size, 5),
        }
    return report


def learning_rate(progress: float, peak: float, warm_up: float = 0.03, floor: float = 0.03) -> float:
    """Linear warm-up, then a cosine to ``floor × peak``; ``progress`` is the share of the budget that is spent."""
    if progress < warm_up:
        return peak * (progress / warm_up * 0.99 + 0.01)
    done = min(1.0, (progress - warm_up) / (1 - warm_up))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Trainer:
    """The model, its optimizer and what has happened so far."""

    model: LlamaForCausalLM
    batches: Batches
    peak: float
    steps: int | None = None
    seconds: float | None = None
    step: int = 0
    spent: float = 0.0
    log: list[dict[str, float | int]] = field(default_factory=list)
    heldout_log: list[dict[str, float | int]] = field(default_factory=list)
    tokens_seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DOMAINS, 0))

    def __post_init__(self) -> None:
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.95), fused=True)

    @property
    def progress(self) -> float:
        """The share of the budget that is spent: of the steps or of the wall-clock time, whichever is further."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.spent / self.seconds if self.seconds else 0.0
        return max(by_steps, by_time)

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 on a GPU, where it is fast; fp32 elsewhere."""
        if self.model.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def train_step(self) -> tuple[float, float]:
        """One update; returns the loss in nats per token and the learning rate it was made with."""
        started = time.monotonic()
        tokens, domains = self.batches(self.step)
        tokens = tokens.to(self.model.device)
        lr = learning_rate(self.progress, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.autocast():
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for domain in domains:
            self.tokens_seen[domain] += self.batches.context
        self.step += 1
        value = float(loss.detach())
        self.spent += time.monotonic() - started
        return value, lr

    def save(self, path: Path) -> None:
        """Write a checkpoint beside ``path``, then rename, so that a kill never leaves half of one."""
        state = {name: getattr(self, name) for name in ("step", "spent", "log", "heldout_log", "tokens_seen")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that ``save`` wrote."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)


def fit(trainer: Trainer, heldout: Mapping[str, Sequence[npt.NDArray[np.int32]]], checkpoint: Path) -> None:
    """Train until the budget is spent; log, evaluate on held-out text and save now and then."""
    batch_tokens = trainer.batches.size * trainer.batches.context
    saved = evaluated = trainer.spent
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=1.0)
        while trainer.progress < 1.0:
            loss, lr = trainer.train_step()
            losses.append(loss)
            if trainer.step % 20 == 0 or trainer.progress >= 1.0:
                mean = sum(losses) / len(losses)
                losses.clear()
                seen = trainer.step * batch_tokens
                entry = {"step": trainer.step, "loss": round(mean, 4), "lr": lr, "tokens": seen}
                trainer.log.append(entry | {"seconds": round(trainer.spent, 1)})
                rate = f"{seen / trainer.spent:.0f} tokens/s"
                bar.update(task, description=f"step {trainer.step}  loss {mean:.3f}  {rate}")
                if trainer.step % 200 == 0 and not console.is_terminal:
                    console.print(f"step {trainer.step}  loss {mean:.3f}  lr {lr:.2e}  {seen} tokens  {rate}")
            bar.update(task, completed=trainer.progress)
            if trainer.spent - evaluated > EVALUATE_SECONDS:
                evaluate_now(trainer, heldout)
                evaluated = trainer.spent
            if trainer.spent - saved > CHECKPOINT_SECONDS:
                trainer.save(checkpoint)
                saved = trainer.spent
    trainer.save(checkpoint)


def evaluate_now(trainer: Trainer, heldout: Mapping[str, Sequence[npt.NDArray[np.int32]]]) -> None:
    """Held-out nats per token on a few rows of each domain, added to the log; the time counts for the budget."""
    started = time.monotonic()
    entry: dict[str, float | int] = {"step": trainer.step}
    for domain, tokens in heldout.items():
        total, count = heldout_loss(trainer.model, tokens[:16])
        entry[domain] = round(total / count, 4)
    trainer.spent += time.monotonic() - started
    trainer.heldout_log.append(entry)
    console.print(f"held out: {entry}")


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a newline at the end."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object with ``text`` and ``source`` per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(json_line, rows)), encoding="utf-8")


def card(record: Mapping[str, Any], report: Mapping[str, Mapping[str, float | int]]) -> str:
    """The model card."""
    shape, versions, tokens = record["shape"], record["versions"], record["tokens"]
    rows = "\n".join(
        f"| {domain} | {tokens['train'][domain]:,} | {tokens['seen'][domain]:,} | {held['tokens']:,} "
        f"| {held['nll_per_token']:.3f} | {held['perplexity']:.2f} | {held['bits_per_byte']:.3f} |"
        for domain, held in report.items()
    )
    sizes = ", ".join(f"{name} {size}" for name, size in shape.items())
    read = ", ".join(f"{name} {versions[name]} ({LICENCES[name]})" for name in LICENCES)
    seen, minutes, rate = sum(tokens["seen"].values()), record["seconds"] / 60, record["tokens_per_second"]
    return f"""# tiny-llama

A small Llama (`LlamaForCausalLM`, grouped-query attention) that has really been trained, for pruning and recovery
experiments that must run anywhere. Made by `tools/train_tiny_lm.py`.

Parameters: {record["parameters"]:,} ({sizes}), embedding and output matrix not tied.
Weights are stored as {record["stored_as"]} and load as float32 (`dtype` in config.json).
Training: {record["steps"]:,} steps, {seen:,} tokens, {minutes:.0f} minutes at {rate:.0f} tokens/s on
{record["hardware"]}, AdamW, peak learning rate {record["peak_learning_rate"]}, {record["batch"]} sequences of {CONTEXT}
tokens per step, seed {record["seed"]}.

| domain | tokens to train on | tokens seen | held-out tokens | nats per token | perplexity | bits per byte |
|---|---:|---:|---:|---:|---:|---:|
{rows}

The held-out numbers are for the rows in `heldout/*.jsonl`, each as `<s> text </s>` in windows of {CONTEXT} tokens.
Whole files are held out by the hash of their name; no held-out row, nor a long paragraph of one, is in training.
Held-out files come from the same packages as the training files, so the style is known, the text is not.
`train/*.jsonl` is a sample of the training rows, for calibration and recovery. `training.json` has the split, the
seed and the versions; `training_log.json` the losses; `heldout.json` the table above.

## Data and licences

`code`: standard library sources, comments kept, docstrings removed. `docs`: docstrings of the standard library and of
the packages below. `topics`: `pydoc_data.topics`. The text samples are excerpts of
{read}
and stay under those licences; each row names its file.
"""


def hardware(device: str, threads: int) -> str:
    """What it ran on, in general words."""
    return "one GPU" if device == "cuda" else f"{threads} CPU thread{'s' if threads > 1 else ''}"


def publish(
    out: Path, trainer: Trainer, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, record: dict[str, Any]
) -> None:
    """Write the output folder beside ``out`` and rename it into place; the report is made from the reloaded files."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    heldout = {domain: sample(corpus.heldout[domain], HELD_OUT_BYTES) for domain in DOMAINS}
    for domain in DOMAINS:
        write_rows(partial / "heldout" / f"{domain}.jsonl", heldout[domain])
        write_rows(partial / "train" / f"{domain}.jsonl", sample(corpus.train[domain], TRAIN_SAMPLE_BYTES))
    tokenizer.save_pretrained(partial)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    texts = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    stored = torch.float32 if texts + 4 * parameters + 200_000 <= ASSET_LIMIT else torch.float16
    state = {name: tensor.detach().to("cpu", stored) for name, tensor in trainer.model.state_dict().items()}
    trainer.model.save_pretrained(partial, state_dict=state)
    # The file's type saves space only: fp16 keeps three more bits than bf16, and these weights are far from its limits.
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    write_json(partial / "config.json", config | {"dtype": "float32"})
    reloaded = LlamaForCausalLM.from_pretrained(partial)
    report = heldout_report(reloaded, tokenizer, heldout)
    record |= {"parameters": parameters, "stored_as": str(stored).removeprefix("torch.")}
    write_json(partial / "heldout.json", report)
    write_json(partial / "training.json", record)
    write_json(partial / "training_log.json", {"steps": trainer.log, "heldout_nll": trainer.heldout_log})
    (partial / "README.md").write_text(card(record, report), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    console.print_json(data=report)


def load_or_build(work: Path, resume: bool) -> tuple[Corpus, PreTrainedTokenizerFast]:
    """The corpus and tokenizer of an earlier run in this work folder, or new ones kept there."""
    stored = work / "corpus.json"
    if resume and stored.exists() and (work / "tokenizer").exists():
        halves = json.loads(stored.read_text(encoding="utf-8"))
        halves = {half: {d: [Row(**row) for row in rows] for d, rows in halves[half].items()} for half in halves}
        return Corpus(**halves), PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    corpus = split(read_domains())
    tokenizer = train_tokenizer(corpus)
    tokenizer.save_pretrained(work / "tokenizer")
    stored.write_text(json.dumps(asdict(corpus)), encoding="utf-8")
    return corpus, tokenizer


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole when the run is complete.")],
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Budget in minutes of wall clock; the schedule follows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the batches; the split has none.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    batch: Annotated[int, typer.Option(help=f"Sequences of {CONTEXT} tokens per step.")] = 8,
    peak: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    work: Annotated[
        Path | None, typer.Option(help="Folder for corpus and checkpoints; OUT.work when not given.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint in the work folder.")] = False,
) -> None:
    """Train a small Llama on Python's own text and write it with its tokenizer and text samples.

    Example: python tools/train_tiny_lm.py --out tools/assets/tiny-llama --minutes 60

    A run that was killed goes on with the same command and --resume. The work folder may be deleted afterwards.
    """
    if steps is None and minutes is None:
        raise typer.BadParameter("give a budget: --steps or --minutes")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The tokenizer's thread pool is made at its first use and reads its size from here.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work = work or out.with_name(out.name + ".work")
    corpus, tokenizer = load_or_build(work, resume)
    train_tokens = {domain: encode(tokenizer, corpus.train[domain]) for domain in DOMAINS}
    heldout = {domain: encode(tokenizer, sample(corpus.heldout[domain], HELD_OUT_BYTES)) for domain in DOMAINS}
    streams = {domain: np.concatenate(rows) for domain, rows in train_tokens.items()}
    config = model_config(len(tokenizer))
    model = LlamaForCausalLM(config)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' wrapper hides its signature
    model.train()
    for domain in DOMAINS:
        console.print(f"{domain}: {len(corpus.train[domain])} rows, {len(streams[domain])} tokens to train on")
    seconds = None if minutes is None else minutes * 60
    trainer = Trainer(model, Batches(streams, batch, seed), peak, steps=steps, seconds=seconds)
    checkpoint = work / "checkpoint.pt"
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
        console.print(f"continuing at step {trainer.step}")
    fit(trainer, heldout, checkpoint)
    names = ("torch", "numpy", "transformers", "tokenizers")
    seen = sum(trainer.tokens_seen.values())
    record = {
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "corpus": corpus.fingerprint(),
        "hardware": hardware(device, threads),
        "steps": trainer.step,
        "seconds": round(trainer.spent),
        "tokens_per_second": round(seen / trainer.spent),
        "peak_learning_rate": peak,
        "batch": batch,
        "context": CONTEXT,
        "domain_weights": DOMAIN_WEIGHTS,
        "shape": {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "ffn": config.intermediate_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocab": config.vocab_size,
        },
        "tokens": {"train": {d: len(stream) for d, stream in streams.items()}, "seen": trainer.tokens_seen},
        "heldout_share": HELD_OUT_SHARE,
        "heldout_sources": {d: sorted({row.source for row in rows}) for d, rows in corpus.heldout.items()},
    }
    publish(out, trainer, tokenizer, corpus, record)


if __name__ == "__main__":
    typer.run(main)
