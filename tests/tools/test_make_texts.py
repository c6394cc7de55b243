"""Texts that are made: words as they are printed, files on one side or the other, the same bytes every time."""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import make_texts
from shear_training.data import load_data, prepare

TAGGED = """

\tThe/at jury/nn said/vbd ,/, ``/`` (/( yes/rb )/) ;/. no/rb ''/'' --/-- 1/2/cd of/in it/ppo ./.
Rome's/np$ too/rb !/.-hl


\tA/at new/jj paragraph/nn :/: `/` here/rb '/' ./.
"""


def names(file: Path) -> list[str]:
    return [json.loads(line)["source"] for line in file.read_text().splitlines()]


def library(folder: Path, files: int) -> Path:
    """So many modules of three paragraphs, and what is no text of the library."""
    for number in range(files):
        (folder / f"m{number}.py").parent.mkdir(exist_ok=True)
        (folder / f"m{number}.py").write_text("\n\n".join(f"x{number} = {line}\n" * 90 for line in range(3)))
    (folder / "test").mkdir()
    (folder / "test" / "test_m.py").write_text("assert 1")
    (folder / "empty.py").write_text("\n")
    return folder


def test_words_are_printed_without_their_tags() -> None:
    assert make_texts.untagged(TAGGED) == (
        "The jury said, \"(yes); no\" -- 1/2 of it. Rome's too!\n\nA new paragraph: 'here'."
    )


def test_pieces_are_whole_paragraphs_and_together_the_text() -> None:
    text = "\n\n".join(letter * 600 for letter in "abcde")
    made = list(make_texts.pieces(text))
    assert [len(piece) for piece in made] == [1202, 1202, 600]
    assert "\n\n".join(made) == text


def test_a_file_is_on_one_side(tmp_path: Path) -> None:
    texts = list(make_texts.standard_library(library(tmp_path / "lib", 40)))
    assert len(texts) == 40
    make_texts.write("code", texts, tmp_path)
    train = {name.partition("#")[0] for name in names(tmp_path / "train/code.jsonl")}
    heldout = {name.partition("#")[0] for name in names(tmp_path / "heldout/code.jsonl")}
    assert heldout == {f"code/m{n}.py" for n in range(40) if zlib.crc32(f"m{n}.py".encode()) % 10 == 0}
    assert train == {f"code/m{n}.py" for n in range(40)} - heldout
    assert len(names(tmp_path / "heldout/code.jsonl")) == 2 * len(heldout)


def test_the_corpus_is_read_from_its_package(tmp_path: Path) -> None:
    for name in ("ca01", "cb02", "README"):
        (tmp_path / name).write_text(f"{name}/nn ./.\n")
    with tarfile.open(tmp_path / "brown.tgz", "w:gz") as archive:
        for name in ("README", "cb02", "ca01"):
            archive.add(tmp_path / name, f"package/{name}")
    assert list(make_texts.brown(tmp_path / "brown.tgz")) == [("ca01", "ca01."), ("cb02", "cb02.")]


def test_what_is_made_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"word{n}" for n in range(2000))
    corpus = [(f"ca{number:02}", f"{number} {words}") for number in range(30)]
    monkeypatch.setattr(make_texts, "packed", lambda work: work)
    monkeypatch.setattr(make_texts, "brown", lambda package: iter(corpus))
    monkeypatch.setattr(make_texts.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    library(tmp_path / "lib", 30)
    file = make_texts.make(tmp_path / "texts")
    tokenizer = AutoTokenizer.from_pretrained(make_texts.ROOT / "tools/assets/tiny-llama")
    found = prepare(load_data(file), tokenizer)
    assert {name: len(source.train) > 0 for name, source in found.items()} == {"prose": True, "code": True}
    monkeypatch.setattr(make_texts, "brown", lambda package: iter(corpus))
    again = make_texts.make(tmp_path / "again").parent
    written = sorted(path.relative_to(again) for path in again.rglob("*.*"))
    assert len(written) == 5
    assert [path for path in written if (again / path).read_bytes() != (file.parent / path).read_bytes()] == []


def test_without_npm_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(make_texts.TextError, match=r"npm, which is not installed: install Node\.js"):
        make_texts.make(tmp_path / "texts")
    assert not (tmp_path / "texts").exists()
