"""An instruction set for the bundled model, made of its own texts: ``instructions.jsonl`` beside them.

    python tools/make_instructions.py

Three kinds of rows: go on with a docstring from its first sentence, explain a topic of the language, write the body of
a function from its head. Training rows are made of training texts and held-out rows of held-out texts, so no answer
to be measured is in anything that is trained on. Texts and licences are those of the rows they are made of, which they
name.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "assets" / "tiny-llama"
SHORT, LONG = 60, 600
"""Characters of an answer: the context of the model is 256 tokens of some three characters."""
BYTES = 280_000

Row = dict[str, str]


def rows(folder: Path) -> list[Row]:
    """All rows, in an order that only the texts decide: kinds in turn, so that a part of them holds every kind."""
    kinds = [list(make(_read(folder / f"{name}.jsonl"))) for name, make in MAKERS.items()]
    made: list[Row] = []
    size = 0
    for number in range(max(map(len, kinds))):
        for kind in kinds:
            if number < len(kind):
                size += len(line(kind[number]).encode())
                if size > BYTES:
                    return made
                made.append(kind[number])
    return made


def docstrings(texts: list[Row]) -> Iterator[Row]:
    """A first sentence, and how the docstring goes on."""
    for text in texts:
        head, _, rest = text["text"].partition("\n\n")
        answer = shortened(rest)
        if head.rstrip().endswith(".") and len(head) < LONG // 3 and len(answer) >= SHORT:
            yield _row("Continue the docstring that begins with this sentence.", head, answer, text)


def topics(texts: list[Row]) -> Iterator[Row]:
    """A topic of the language reference, and its first paragraphs."""
    seen: set[str] = set()
    for text in texts:
        name = text["source"].partition("#")[2]
        heading, _, body = text["text"].partition("\n\n")
        # A later part of a topic has no heading, which is underlined with stars.
        if name not in seen and "\n***" in heading and len(answer := shortened(body)) >= SHORT:
            seen.add(name)
            title = heading.splitlines()[0].strip().rstrip(".").replace('"', "'")
            yield _row(f"Explain this topic of the Python language: {title}.", "", answer, text)


def functions(texts: list[Row]) -> Iterator[Row]:
    """The head of a function, and its body."""
    for text in texts:
        try:
            tree = ast.parse(text["text"])
        except SyntaxError:  # a piece of a file may begin or end anywhere
            continue
        lines = text["text"].splitlines()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).rstrip()
                body = "\n".join(lines[node.body[0].lineno - 1 : node.end_lineno])
                if head.endswith(":") and SHORT <= len(body) <= LONG:
                    yield _row("Write the body of this Python function.", head, body, text)


MAKERS = {"docs": docstrings, "topics": topics, "code": functions}
"""Name of a file of training texts to what is made of it."""


def shortened(text: str) -> str:
    """The first paragraphs of ``text``, as many as fit; at least some of the first."""
    kept = ""
    for paragraph in text.strip("\n").split("\n\n"):
        if len(kept) + len(paragraph) > LONG:
            break
        kept += ("\n\n" if kept else "") + paragraph
    return kept.rstrip()


def line(row: Row) -> str:
    """The row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _row(instruction: str, given: str, answer: str, text: Row) -> Row:
    return {"instruction": instruction, "input": given, "output": answer, "source": text["source"]}


def _read(path: Path) -> list[Any]:
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write both files."""
    for half in ("train", "heldout"):
        made = rows(FOLDER / half)
        (FOLDER / half / "instructions.jsonl").write_text("".join(map(line, made)), encoding="utf-8")
        print(f"{half}: {len(made)} rows")


if __name__ == "__main__":
    main()
