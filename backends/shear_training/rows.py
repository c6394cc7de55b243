"""Rows of tokens: texts packed end to end, conversations one by one with the loss on what the assistant says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shear_ir.errors import LoadError
from shear_ir.limits import bounded
from shear_training.documents import Document, Turn

IGNORED = -100
"""The label of a token that is not learnt."""

BATCH = 256
_LETTERS = 1 << 18
"""Of documents that are encoded at once."""
Marked = tuple[list[int], list[bool]]
"""Token ids, and which of them count for the loss."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of ``length`` tokens, padded on the right.

    ``ids`` int32 and ``counted`` bool have shape ``(rows, length)``: the tokens, and whether the loss counts them;
    ``lengths`` int64 has shape ``(rows,)``: tokens before the padding.
    """

    ids: Tensor
    counted: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.ids[part], self.counted[part], self.lengths[part])

    def spread(self, count: int) -> Rows:
        """``count`` rows, each as far from the one before as there are whole steps; all where there are no more."""
        return self[:: max(1, len(self) // count)][:count]

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.lengths.sum())

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        made = hashlib.sha256()
        for tensor in (self.ids, self.counted, self.lengths):
            made.update(tensor.contiguous().numpy())  # type: ignore[arg-type]
        return made.hexdigest()[:16]

    def batch(self, rows: Sequence[int] | slice) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` int64 of shape ``(batch, longest)``; where there is padding, its mask."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        ids, counted = self.ids[rows, :longest].long(), self.counted[rows, :longest]
        made = {"input_ids": ids, "labels": ids.masked_fill(~counted, IGNORED)}
        if int(lengths.min()) < longest:
            made["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return made


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, length: int, batch: int = BATCH
) -> Iterator[Marked]:
    """Windows of ``length`` tokens over ``<bos> text <eos>`` of all documents end to end; the last may be shorter.

    ``batch``: documents taken from the stream at a time.
    """
    before, after = ends(tokenizer)
    kept: list[int] = []
    for some in _batches(documents, batch):
        encoded = _encode(tokenizer, [document.text for document in some])
        kept += chain.from_iterable((*before, *ids, *after) for ids in encoded)
        whole = len(kept) // length * length
        for start in range(0, whole, length):
            yield kept[start : start + length], [True] * length
        del kept[:whole]
    if len(kept) > 1:
        yield kept, [True] * len(kept)


def converse(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, length: int, batch: int = BATCH
) -> Iterator[Marked]:
    """One row per conversation; it is cut at ``length`` tokens, and left out when no answer begins before that.

    ``batch``: documents taken from the stream at a time.
    """
    for some in _batches(documents, batch):
        parts = [_parts(document.turns, tokenizer) for document in some]
        encoded = iter(_encode(tokenizer, [text for pieces in parts for text, _ in pieces]))
        for pieces in parts:
            marked = [(next(encoded), answer) for _, answer in pieces]
            ids = list(chain.from_iterable(ids for ids, _ in marked))[:length]
            counted = list(chain.from_iterable([answer] * len(ids) for ids, answer in marked))[:length]
            # The first token of a row is predicted from nothing.
            if any(counted[1:]):
                yield ids, counted


def stacked(marked: Iterable[Marked], length: int, pad: int) -> Rows:
    """Rows of ``marked``, padded with the token ``pad``."""
    # As tensors while they come: a list of numbers takes ten times the memory.
    kept = [(torch.tensor(ids, dtype=torch.int32), torch.tensor(counted)) for ids, counted in marked]
    rows = Rows(
        torch.full((len(kept), length), pad, dtype=torch.int32),
        torch.zeros(len(kept), length, dtype=torch.bool),
        torch.tensor([len(ids) for ids, _ in kept], dtype=torch.int64),
    )
    for number, (ids, counted) in enumerate(kept):
        rows.ids[number, : len(ids)] = ids
        rows.counted[number, : len(ids)] = counted
    return rows


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that begin and end a text: none where the tokenizer has no such token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[token] if isinstance(token, int) else [] for token in (bos, eos)]  # type: ignore[return-value]


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; its loss never counts, so any will do where the tokenizer has none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if isinstance(token, int)), 0)


def _batches(documents: Iterable[Document], batch: int) -> Iterator[list[Document]]:
    """``batch`` documents at a time, or fewer that are long: tokenizers keep a hundred bytes for each token."""
    some: list[Document] = []
    letters = 0
    for document in documents:
        some.append(document)
        letters += len(document.text) + sum(len(turn.content) for turn in document.turns)
        if len(some) == batch or letters >= _LETTERS:
            yield some
            some, letters = [], 0
    if some:
        yield some


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Not verbose: a text may well be longer than the model's context, for it is cut into windows.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _parts(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, each with whether it is an answer."""
    return _templated(turns, tokenizer) if getattr(tokenizer, "chat_template", None) else _plain(turns, tokenizer)


def _plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """For a tokenizer without a chat template: the wording that instruction data sets have made usual."""
    bos, eos = (token if isinstance(token, str) else "" for token in (tokenizer.bos_token, tokenizer.eos_token))
    pieces = [(bos, False)]
    for turn in turns:
        if turn.role == "assistant":
            pieces += [("### Response:\n", False), (turn.content + (eos or "\n"), True), ("\n", False)]
        elif turn.role == "user":
            pieces.append((f"### Instruction:\n{turn.content}\n\n", False))
        else:
            pieces.append((f"{turn.content}\n\n", False))
    last = max(i for i, (_, answer) in enumerate(pieces) if answer)
    return [piece for piece in pieces[: last + 1] if piece[0]]


def _templated(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """By the tokenizer's own template. Where that rewrites earlier turns, as some do, the last answer alone counts."""
    with bounded("the chat template of the tokenizer"):
        return _rendered(turns, tokenizer)


def _rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    for chosen in (answers, answers[-1:]):
        pieces: list[tuple[str, bool]] = []
        told = ""
        for answer in chosen:
            try:
                asked = _render(tokenizer, messages[:answer], True)
                whole = _render(tokenizer, messages[: answer + 1], False)
            except TemplateError:  # it refuses these roles, or their order
                return []
            if not (asked.startswith(told) and whole.startswith(asked)):
                break
            pieces += [(asked[len(told) :], False), (whole[len(asked) :], True)]
            told = whole
        else:
            return [piece for piece in pieces if piece[0]]
    return []


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answering: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)  # type: ignore[return-value]
    except (TemplateError, MemoryError):
        raise
    except Exception as failure:  # whatever a template may do with what it is given
        raise LoadError(f"the chat template of the tokenizer fails: {type(failure).__name__}: {failure}") from failure
