"""The smallest program that breaks as a given one does: lines and results leave, one after the other, while it still breaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.oracle.fuzz.draft import Sketch

NAME = re.compile(r"\b(?:self\.\w+|v\d+)\b")


def failure_of(run: Callable[[], object]) -> str:
    """What ``run`` raises, as text; empty when it raises nothing."""
    try:
        run()
    except Exception as failure:
        text = f"{type(failure).__name__}: {failure}"
        return text.partition("\n\nWhile executing")[0]
    return ""


def shrunk(sketch: Sketch, fails: Callable[[Sketch], str], tries: int = 300) -> Sketch:
    """``fails`` gives the failure as text, whose first words must stay what they are."""
    wanted = _kind(fails(sketch))
    left = tries
    shrinking = True
    while shrinking and left > 0:
        shrinking = False
        for smaller in _smaller(sketch):
            left -= 1
            if left > 0 and _kind(fails(smaller)) == wanted:
                sketch, shrinking = smaller, True
                break
    return sketch


def _kind(failure: str) -> str:
    """The failure without its numbers and names."""
    return " ".join(re.sub(r"[\d.]+(e-\d+)?", "", failure).split()[:5])


def _smaller(sketch: Sketch) -> Iterator[Sketch]:
    if len(sketch.returns) > 1:
        for name in sketch.returns:
            yield _tidy(replace(sketch, returns=tuple(n for n in sketch.returns if n != name)))
    for place in range(len(sketch.lines) - 1, -1, -1):
        made = _made(sketch.lines[place])
        rest = (*sketch.lines[:place], *sketch.lines[place + 1 :])
        if not made:
            yield _tidy(replace(sketch, lines=rest))
            continue
        # What the line made is what it read.
        read = [n for n in NAME.findall(sketch.lines[place].partition(" = ")[2]) if not n.startswith("self.")]
        for source in dict.fromkeys((*read, *sketch.inputs)):
            names = dict.fromkeys(made, source)
            lines = tuple(_renamed(line, names) for line in rest)
            yield _tidy(replace(sketch, lines=lines, returns=tuple(names.get(n, n) for n in sketch.returns)))
        if set(made) & set(sketch.returns) and read:
            returns = tuple(dict.fromkeys(read[0] if n in made else n for n in sketch.returns))
            yield _tidy(replace(sketch, returns=returns))


def _tidy(sketch: Sketch) -> Sketch:
    """Without lines and tensors that nobody reads."""
    lines: list[str] = []
    needed = set(sketch.returns)
    for line in reversed(sketch.lines):
        made = _made(line)
        if not made or needed & set(made):
            lines.insert(0, line)
            needed |= set(NAME.findall(line))
    setup = tuple(line for line in sketch.setup if line.partition(" = ")[0] in needed)
    return replace(sketch, lines=tuple(lines), setup=setup)


def _made(line: str) -> list[str]:
    """Names that a line gives values to; none for one that writes in place."""
    left, found, _ = line.partition(" = ")
    return re.findall(r"v\d+", left) if found and re.fullmatch(r"[v\d, ]+", left) else []


def _renamed(line: str, names: dict[str, str]) -> str:
    return re.sub(r"\bv\d+\b", lambda name: names.get(name[0], name[0]), line)
