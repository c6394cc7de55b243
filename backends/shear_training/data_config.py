"""``data.yaml``: the sources that a model is measured on and recovered with, and the stages that use them."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shear_ir.errors import LoadError
from shear_ir.reading import Unreadable, first_error, require_sound, text_in

TEXT_FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv",
}  # fmt: skip
"""File extension to the builder of ``datasets`` that reads it."""

_LARGEST = 2**18
"""Bytes and entries of a YAML file, which people write, at most."""

SourceKind = Literal["text", "instruction", "chat"]
# Files are named by it.
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", max_length=60)]
FileNames = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
_Count = Annotated[int, Field(ge=1, le=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Strict):
    """Where the documents of one source lie and what their fields mean.

    ``path``: files, globs allowed, relative to ``data.yaml``; or ``hub``: a dataset id with ``config`` and ``split``.
    Text is in the field ``text``; instructions in ``prompt``, ``input`` and ``response``; chats in ``messages``.
    ``validation``: files of its own to measure on; ``validation_rows``: how many rows of them, or of the source.
    ``rows``: at most so many rows to train on.
    """

    path: Annotated[str, Field(min_length=1)] | FileNames | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    text: str | None = None
    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    validation: Annotated[str, Field(min_length=1)] | FileNames | None = None
    validation_rows: _Count | None = None
    rows: _Count | None = None

    @model_validator(mode="after")
    def _one_place_and_one_kind(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path, which names files, or hub, which names a dataset")
        if self.path is not None and (self.config is not None or "split" in self.model_fields_set):
            raise ValueError("config and split belong to a hub dataset, not to files")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response are given together")
        if self.input is not None and self.prompt is None:
            raise ValueError("input goes with prompt and response")
        if sum(field is not None for field in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give one of text, prompt with response, or messages")
        return self

    @property
    def kind(self) -> SourceKind:
        """What a document is."""
        if self.messages is not None:
            return "chat"
        return "instruction" if self.prompt is not None else "text"


class StageConfig(_Strict):
    """One stage of recovery: its name, and the sources it mixes."""

    name: Name
    sources: Annotated[list[Name], Field(min_length=1)]


class DataConfig(_Strict):
    """All of ``data.yaml``. ``length``: tokens per row; ``validation``: rows to measure on, per source.

    A source with validation files of its own gives at most ``validation`` rows of them; one without gives exactly so
    many of its own. ``folder``: what paths are relative to.
    """

    length: Annotated[int, Field(ge=2, le=2**20)] = 256
    validation: _Count = 64
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    sources: Annotated[dict[Name, SourceConfig], Field(min_length=1)]
    stages: Annotated[list[StageConfig], Field(min_length=1)] | None = None
    folder: Annotated[Path, Field(exclude=True)] = Path()

    @model_validator(mode="after")
    def _stages_name_sources(self) -> DataConfig:
        names = [stage.name for stage in self.stages or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the name {max(names, key=names.count)}")
        for stage in self.stages or ():
            unknown = [name for name in stage.sources if name not in self.sources]
            if unknown:
                raise ValueError(f"the stage {stage.name} mixes {unknown[0]}, which is no source")
            if len(set(stage.sources)) < len(stage.sources):
                raise ValueError(f"the stage {stage.name} names a source twice")
        return self

    @property
    def road(self) -> tuple[StageConfig, ...]:
        """The stages in order; one with all sources where the file names none."""
        return tuple(self.stages or (StageConfig(name="recovery", sources=list(self.sources)),))


def load_data(path: str | Path, *, whole: bool = False) -> DataConfig:
    """Read ``data.yaml``, or take a file of rows as the one source that it is.

    ``whole``: all rows of a file that is no YAML are for measuring, none for training. Raises ``LoadError`` with the
    place and the reason.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() in TEXT_FORMATS:
        return _single(file, whole)
    if file.suffix.lower() not in (".yaml", ".yml"):
        known = ", ".join([".yaml", *TEXT_FORMATS])
        raise LoadError(f"{path} cannot be used as data: its name ends in none of {known}")
    read = yaml_in(file, "the data file")
    if not isinstance(read, dict):
        raise LoadError(f"{path} must be a mapping with the key sources")
    if "folder" in read:
        raise LoadError(f"{path}: folder: paths are relative to the folder of the file")
    return _validated(read | {"folder": file.parent}, file)


def _single(file: Path, whole: bool) -> DataConfig:
    if not file.is_file():
        raise LoadError(f"there is no data file {file}")
    name = "".join(c if c.isalnum() or c in "_.-" else "_" for c in file.stem).lstrip(".")[:60] or "data"
    # A file is no pattern, whatever its name.
    source = {"path": _escaped(file.name)}
    if whole:
        return _validated(
            {"sources": {name: source | {"validation": _escaped(file.name)}}, "validation": 2**31,
             "folder": file.parent}, file,
        )  # fmt: skip
    return _validated({"sources": {name: source}, "folder": file.parent}, file)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _validated(document: dict[str, Any], file: Path) -> DataConfig:
    try:
        return DataConfig.model_validate(document)
    except ValidationError as failure:
        raise LoadError(f"{file}: {first_error(failure)}") from failure


def yaml_in(path: Path, what: str) -> Any:
    """The document in a YAML file; raises ``LoadError`` that says ``what`` the file was to be."""
    try:
        text = text_in(path, _LARGEST)
    except Unreadable as failure:
        raise LoadError(f"{what} {path} cannot be read: {failure}") from failure
    try:
        read = yaml.load(text, Loader=UniqueLoader)
        require_sound(read, entries=_LARGEST)
    except RecursionError as failure:
        raise LoadError(f"{path} is no YAML: it is nested too deep") from failure
    except Exception as failure:  # its constructors raise whatever Python's own do for a date or a number that is none
        raise LoadError(f"{path} is no YAML: {' '.join(str(failure).split())}") from failure
    return read


class UniqueLoader(yaml.SafeLoader):
    """The safe loader; a key that occurs twice in a mapping is an error, not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} occurs twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else str(key))
        return super().construct_mapping(node, deep=deep)
