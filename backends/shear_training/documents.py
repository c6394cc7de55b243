"""The documents of a source, read by ``datasets`` from files or from the hub, in a seeded order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shear_ir.errors import LoadError
from shear_ir.frontend.files import HUB_ID
from shear_ir.reading import Unreadable, json_in, json_of, reasons, require_regular
from shear_training.data_config import TEXT_FORMATS, DataConfig, SourceConfig

_PEEK, _LINE = 2**12, 2**26
"""Bytes of a file of rows that are looked at to see how it begins, and that a row has at most."""

_PIECE = 2**18
"""Characters of a text that are turned into tokens at once, which takes some two hundred bytes for each."""

_SHUFFLE = 10_000
"""Documents of a streamed dataset that are shuffled together."""


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` is system, user or assistant (or another that the chat template knows)."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A text, or a conversation whose assistant turns are what is learnt."""

    text: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def digest(self) -> bytes:
        """A hash of the words, whatever the space between them."""
        parts = [self.text, *(part for turn in self.turns for part in (turn.role, turn.content))]
        return hashlib.sha256("\0".join(" ".join(part.split()) for part in parts).encode()).digest()


def read_documents(name: str, source: SourceConfig, config: DataConfig) -> Iterator[Document]:
    """The usable documents of a source in an order drawn by ``config.seed``; raises ``LoadError`` naming the source."""
    if source.path is not None:
        rows = _from_files(name, source.path, config.folder)
        return _documents(name, source, _shuffled(rows, config.seed))
    return _documents(name, source, _from_hub(name, source, config.seed))


def read_validation(name: str, source: SourceConfig, config: DataConfig) -> Iterator[Document]:
    """The documents of the validation files of a source, in their order."""
    assert source.validation is not None
    return _documents(name, source, _from_files(name, source.validation, config.folder))


def _from_files(name: str, patterns: str | list[str], folder: Path) -> Any:
    files = [file for pattern in ([patterns] if isinstance(patterns, str) else patterns)
             for file in _matches(name, pattern, folder)]  # fmt: skip
    kinds = {TEXT_FORMATS.get(file.suffix.lower(), "") for file in files}
    if "" in kinds:
        odd = next(file for file in files if file.suffix.lower() not in TEXT_FORMATS)
        raise LoadError(f"source {name}: {odd} has none of the extensions {', '.join(TEXT_FORMATS)}")
    if len(kinds) > 1:
        raise LoadError(f"source {name}: files of one source have one format, not {' and '.join(sorted(kinds))}")
    if not any(file.stat().st_size for file in files):
        raise LoadError(f"source {name}: {files[0]} is empty")
    for file in files:
        try:
            require_rows(file)
        except Unreadable as failure:
            raise LoadError(f"source {name} cannot be read: {file}: {failure}") from failure
    kind = kinds.pop()
    # A blank line separates the documents of a text file.
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    # Escaped, for datasets would read a name with a star or a bracket as a pattern.
    return _load(name, kind, data_files=[_escaped(file) for file in files], split="train", **options)


def require_rows(file: Path) -> None:
    """Raise ``Unreadable`` for a file whose rows pyarrow breaks on: it ends the process where one is no object."""
    require_regular(file)
    if file.suffix.lower() not in (".json", ".jsonl"):
        return
    with reasons(), file.open("rb") as lines:
        begun = lines.read(_PEEK).lstrip()[:1]
        lines.seek(0)
        if begun == b"[" or (file.suffix.lower() == ".json" and _is_one(file)):
            found = json_of(lines.read(), loose=True)
            for number, row in enumerate(found if isinstance(found, list) else [found]):
                if not isinstance(row, dict):
                    raise Unreadable(f"row {number + 1} is no object")
            return
        number = 0
        while line := lines.readline(_LINE + 1):
            number += 1
            if len(line) > _LINE:
                raise Unreadable(f"line {number} has more than {_LINE:,} bytes")
            if line.strip() and not isinstance(_row(line, number), dict):
                raise Unreadable(f"line {number} is no object")


def _is_one(file: Path) -> bool:
    """Whether a file is one document, not one on each line."""
    try:
        json_in(file, loose=True)
    except Unreadable:
        return False
    return True


def _row(line: bytes, number: int) -> Any:
    try:
        return json_of(line, loose=True)
    except Unreadable as failure:
        raise Unreadable(f"line {number}: {failure}") from failure


def _matches(name: str, pattern: str, folder: Path) -> list[Path]:
    path = Path(pattern).expanduser()
    root = Path(path.anchor) if path.is_absolute() else folder
    relative = path.relative_to(path.anchor) if path.is_absolute() else path
    found = sorted(file for file in root.glob(str(relative)) if file.is_file())
    if not found:
        raise LoadError(f"source {name}: no file matches {root / relative}")
    return found


def _escaped(file: Path) -> str:
    import glob

    return glob.escape(str(file.absolute()))


def _from_hub(name: str, source: SourceConfig, seed: int) -> Iterable[dict[str, Any]]:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    # A reader of datasets by its name would look for files in the current folder, one of them for pickles.
    hub = source.hub or ""
    if not HUB_ID.fullmatch(hub) or hub in _PACKAGED_DATASETS_MODULES or Path(hub).exists():
        raise LoadError(f"source {name}: {hub!r} is no name of a dataset on the hub; files are named by path")
    # Streamed where only some rows are wanted, so that not all of a large corpus is fetched.
    stream = source.rows is not None
    rows = _load(name, source.hub, name=source.config, split=source.split, streaming=stream)
    return rows.shuffle(seed=seed, buffer_size=_SHUFFLE) if stream else _shuffled(rows, seed)


def _load(source: str, /, *args: Any, **kwargs: Any) -> Any:
    import datasets
    from datasets.utils import logging

    shown = datasets.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    datasets.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as failure:  # its builders raise whatever their parsers do
        cause = failure.__cause__ or failure
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise LoadError(f"source {source} cannot be read: {lines[0] if lines else type(cause).__name__}") from failure
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bar()


def _shuffled(rows: Any, seed: int) -> Iterator[dict[str, Any]]:
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        yield rows[index]


def _documents(name: str, source: SourceConfig, rows: Iterable[dict[str, Any]]) -> Iterator[Document]:
    wanted = _fields(source)
    for number, row in enumerate(rows):
        missing = [] if number else [field for field in wanted if field not in row]
        if missing:
            raise LoadError(f"source {name} has no field '{missing[0]}', only {', '.join(row)}")
        document = _document(source, row)
        if document is not None:
            yield from _pieces(document)


def _pieces(document: Document) -> Iterator[Document]:
    """A text without end, in parts that end with a word."""
    text = document.text
    while len(text) > _PIECE:
        cut = text.rfind(" ", _PIECE // 2, _PIECE) + 1 or _PIECE
        yield Document(text=text[:cut])
        text = text[cut:]
    yield Document(text=text, turns=document.turns)


def _fields(source: SourceConfig) -> list[str]:
    if source.kind == "text":
        return [source.text or "text"]
    fields = (source.prompt, source.input, source.response, source.messages)
    return [field for field in fields if field is not None]


def _document(source: SourceConfig, row: dict[str, Any]) -> Document | None:
    """The document of a row; None where a row says nothing."""
    if source.kind == "text":
        text = _text(row.get(source.text or "text"))
        return Document(text=text) if text.strip() else None
    turns = _turns(source, row)
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        return None
    return Document(turns=turns)


def _turns(source: SourceConfig, row: dict[str, Any]) -> tuple[Turn, ...]:
    if source.kind == "chat":
        messages = row.get(source.messages or "") or ()
        return tuple(Turn(*_message(m)) for m in messages if isinstance(m, dict))
    prompt, more = _text(row.get(source.prompt or "")), _text(row.get(source.input or ""))
    asked = f"{prompt}\n\n{more}" if more.strip() else prompt
    return (Turn("user", asked), Turn("assistant", _text(row.get(source.response or ""))))


def _message(message: dict[str, Any]) -> tuple[str, str]:
    """Role and content under their two usual spellings."""
    role = _text(message.get("role") or message.get("from"))
    content = _text(message.get("content") or message.get("value"))
    return {"human": "user", "gpt": "assistant"}.get(role, role), content


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
