"""Rows to train on and rows to measure on, per source; no text is in both."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from shear_ir.errors import LoadError
from shear_training.data_config import DataConfig, SourceConfig, StageConfig, load_data
from shear_training.documents import Document, read_documents, read_validation
from shear_training.rows import BATCH, Rows, converse, pack, padding, stacked

__all__ = ["DataConfig", "Rows", "Source", "SourceConfig", "StageConfig", "held_out", "load_data", "prepare"]

SourceProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, eq=False)
class Source:
    """One source of text: rows to train on and rows to measure on, made of different documents."""

    name: str
    train: Rows
    validation: Rows


def prepare(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: SourceProgress | None = None
) -> dict[str, Source]:
    """The rows of every source, in the order of the file; the same every time.

    Validation documents come first and leave the stream; a document whose text is that of a validation document of
    any source is not trained on. Raises ``LoadError`` naming a source without usable rows, or with too few.
    """
    readers = {name: _Reader(name, source, config, tokenizer) for name, source in config.sources.items()}
    total = 2 * len(readers)
    for number, reader in enumerate(readers.values()):
        _tell(progress, f"reading {reader.name}", number, total)
        reader.hold_out()
    held = {digest for reader in readers.values() for digest in reader.digests}
    made = {}
    for number, (name, reader) in enumerate(readers.items()):
        _tell(progress, f"reading {name}", len(readers) + number, total)
        made[name] = Source(name, reader.train(held), reader.validation)
    _tell(progress, "reading", total, total)
    return made


def held_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: SourceProgress | None = None
) -> dict[str, Rows]:
    """The validation rows of every source alone, as ``prepare`` makes them."""
    made = {}
    for number, (name, source) in enumerate(config.sources.items()):
        _tell(progress, f"reading {name}", number, len(config.sources))
        reader = _Reader(name, source, config, tokenizer)
        reader.hold_out()
        made[name] = reader.validation
    _tell(progress, "reading", len(made), len(made))
    return made


class _Reader:
    """One source while it is read: ``hold_out`` first, then ``train``."""

    def __init__(self, name: str, source: SourceConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.source, self.config, self.tokenizer = name, source, config, tokenizer
        self.digests: set[bytes] = set()
        self.documents: Iterator[Document] | None = None

    def hold_out(self) -> None:
        """Read the rows to measure on, and the digests of their documents."""
        source, name = self.source, self.name
        own = source.validation is not None
        wanted = source.validation_rows or self.config.validation
        if own:
            read = read_validation(name, source, self.config)
        else:
            self.documents = read = read_documents(name, source, self.config)
        # One by one where they leave the stream that training goes on with.
        self.validation = self._rows(self._noted(read), wanted, BATCH if own else 1)
        found = len(self.validation)
        if not found:
            raise LoadError(f"source {name} has no usable row{' to measure on' if own else ''}")
        exact = not own or source.validation_rows is not None
        if exact and found < wanted:
            raise LoadError(
                f"source {name} has {found} rows of {self.config.length} tokens, fewer than the {wanted} that "
                "validation asks for"
            )
        if own:
            # All of a validation file is kept out of training, whether it is measured on or not.
            self.digests.update(document.digest for document in read)

    def train(self, held: Container[bytes]) -> Rows:
        """The rows to train on: of the documents that are left and not held out."""
        documents = self.documents or read_documents(self.name, self.source, self.config)
        left = (document for document in documents if document.digest not in held)
        rows = self._rows(left, self.source.rows)
        if not len(rows):
            raise LoadError(f"source {self.name} has no usable row left to train on")
        return rows

    def _noted(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.digests.add(document.digest)
            yield document

    def _rows(self, documents: Iterable[Document], limit: int | None, batch: int = BATCH) -> Rows:
        make = pack if self.source.kind == "text" else converse
        length = self.config.length
        marked = islice(make(documents, self.tokenizer, length, batch), limit)
        return stacked(marked, length, padding(self.tokenizer))


def _tell(progress: SourceProgress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
