"""The folder of a run: what each stage left, so that a run that was stopped goes on with what is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from shear_ir.errors import PlanError, SaveError
from shear_ir.reading import Unreadable, json_in
from shear_ir.writing import write_text

RUN_FILE = "run.json"


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Hold the folder of a run until its end; raises ``PlanError`` when another run holds it."""
    if os.environ.get("RANK", "0") != "0":  # of several processes of one run, the first holds it for all
        yield
        return
    beside = place.with_name(f".{place.name}.lock")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside, timeout=0)
        lock.acquire()
    except Timeout as failure:
        raise PlanError(f"another run is working in {place}: wait for its end, or give another folder") from failure
    except OSError as failure:
        raise SaveError(f"{beside} cannot be written: {failure.strerror}") from failure
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        lock.release()


class Work:
    """One run's folder. Only the main process of several writes; the others wait and read what it wrote.

    ``state``: the processes of the run. ``digests``: what it was begun with, by the words that a refusal uses. Raises
    ``PlanError`` for a folder of another run or with other files, ``SaveError`` where none can be made.
    """

    def __init__(self, folder: Path, state: PartialState, digests: Mapping[str, str]) -> None:
        self.folder, self.state = folder, state
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise SaveError(f"{folder} cannot be made: {failure.strerror}") from failure
        begun = self.document(RUN_FILE, lambda: dict(digests))
        for what, digest in digests.items():
            if begun.get(what) != digest:
                raise PlanError(
                    f"{folder} holds a run that was begun with other {what}: remove the folder to begin anew, or give "
                    "what it was begun with"
                )

    def path(self, name: str) -> Path:
        """Where the artefact ``name`` lies, there or not."""
        return self.folder / name

    def document(self, name: str, make: Callable[[], dict[str, Any]], *, together: bool = False) -> dict[str, Any]:
        """The JSON artefact ``name``, made by the main process when it is not there.

        ``together``: all processes ``make`` it, each its share; what the main process has is written.
        """
        path = self.path(name)
        if together:
            self.together(path.is_file(), lambda: self._written(name, make()))
        else:
            self.once(path.is_file(), lambda: self.write(name, make()))
        try:
            read = json_in(path, infinite=True)
        except Unreadable as failure:
            raise PlanError(f"{path} cannot be read: remove it, and it is made anew") from failure
        if not isinstance(read, dict):
            raise PlanError(f"{path} is no artefact of this stage: remove it, and it is made anew")
        return read

    def _written(self, name: str, document: Mapping[str, Any]) -> None:
        if self.state.is_main_process:
            self.write(name, document)

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write the JSON artefact ``name``; for the main process, within ``once``."""
        write_text(self.path(name), json.dumps(document, indent=1))

    def once(self, done: bool, make: Callable[[], object]) -> None:
        """Have the main process ``make`` something unless it is ``done``; returns when it is there for everybody."""
        self.state.wait_for_everyone()
        if not done and self.state.is_main_process:
            make()
        self.state.wait_for_everyone()

    def together(self, done: bool, make: Callable[[], object]) -> None:
        """Have all processes ``make`` something unless the main one finds it ``done``; returns when all have."""
        told = [done]
        if self.state.num_processes > 1:
            broadcast_object_list(told)  # before anybody writes, and where files take a while to be seen
        if not told[0]:
            make()
        self.state.wait_for_everyone()


def digest_of(document: Any) -> str:
    """A hash of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()[:16]


def place_of(out: Path, work: str | Path | None) -> Path:
    """The folder of a run that writes ``out``: ``work``, beside ``out`` when None.

    It is removed at the end, so ``PlanError`` where ``out`` would go with it, or where it holds what no run has made.
    """
    place = Path(work) if work is not None else out.with_name(f"{out.name}.work")
    mine, result = place.resolve(), out.resolve()
    if mine == result or mine in result.parents or result in mine.parents:
        raise PlanError(f"{place} cannot be the folder of the run's artefacts and {out} its result: keep them apart")
    if place.is_dir() and not (place / RUN_FILE).is_file() and any(place.iterdir()):
        raise PlanError(f"{place} holds files of something else, and would be removed at the end: choose a new folder")
    return place
