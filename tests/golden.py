"""Golden text: the printed result is the expectation, and ``pytest --accept`` rewrites it for you to read.

    expect(
        printed(program),
        '''
        %y : f32[2, h:4] = aten.relu(%x)
        ''',
    )
    expect_file(printed(program), "llama.txt")  # tests/dumps/llama.txt

Indentation as a whole, blank lines at either end and spaces at line ends do not count.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest

DUMPS = Path(__file__).parent / "dumps"


def expect(actual: str, expected: str) -> None:
    """``actual`` reads like ``expected``: a string literal in the calling test, which ``--accept`` may rewrite."""
    __tracebackhide__ = True
    caller = inspect.currentframe()
    assert caller is not None
    assert caller.f_back is not None
    if _accepted is None:
        _compare(tidy(actual), tidy(expected))
    else:
        _accepted.note(caller.f_back, tidy(actual), tidy(expected))


def expect_file(actual: str, path: str | Path) -> None:
    """``actual`` reads like the file at ``path``, which is relative to tests/dumps; ``--accept`` writes it."""
    __tracebackhide__ = True
    file = DUMPS / path
    expected = tidy(file.read_text(encoding="utf-8")) if file.exists() else ""
    if _accepted is None:
        _compare(tidy(actual), expected)
    elif tidy(actual) != expected:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tidy(actual) + "\n", encoding="utf-8")
        _accepted.report.append(str(file))


def tidy(text: str) -> str:
    """``text`` without common indentation, blank lines at either end, and spaces at line ends."""
    return textwrap.dedent("\n".join(line.rstrip() for line in text.splitlines())).strip("\n")


def other_versions() -> str:
    """The libraries whose graphs are printed, where they are not those of constraints.txt; empty where they are."""
    lines = (DUMPS.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines if line.startswith(("torch==", "transformers==")))
    here = {name: version(name).partition("+")[0] for name in wanted}
    return " and ".join(f"{name} {here[name]}" for name in wanted if here[name] != wanted[name])


def _compare(actual: str, expected: str) -> None:
    __tracebackhide__ = True
    if actual != expected:
        if other := other_versions():
            pytest.skip(f"the text is that of the versions in constraints.txt, and here is {other}")
        diff = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "expected", "actual", lineterm="")
        pytest.fail("\n".join([*diff, "", "If the new text is right, let `pytest --accept` write it."]), pytrace=False)


class Edit(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file become ``text``."""

    begin: int
    end: int
    text: bytes


@dataclass
class Accepted:
    """Expectations met in this session; written together at its end, so that no line moves while tests still run."""

    sources: dict[Path, bytes] = field(default_factory=dict)
    texts: dict[tuple[Path, int], str] = field(default_factory=dict)
    edits: dict[Path, list[Edit]] = field(default_factory=lambda: defaultdict(list))
    report: list[str] = field(default_factory=list)

    def note(self, caller: FrameType, actual: str, expected: str) -> None:
        """Remember what the ``expect`` that ``caller`` is in the middle of should say."""
        __tracebackhide__ = True
        path = Path(caller.f_code.co_filename)
        source = self.sources.setdefault(path, path.read_bytes())
        call = _call_in_progress(source, caller)
        literal = _expected_literal(call) if call else None
        if call is None or literal is None:
            if actual != expected:
                pytest.fail(
                    "--accept rewrites literals only: write the expected text inside expect(...)", pytrace=False
                )
            return
        edit = _edit(source, call, literal, actual)
        if self.texts.setdefault((path, edit.end), actual) != actual:
            pytest.fail("--accept cannot choose: this expect(...) met two different texts", pytrace=False)
        if actual != expected and edit not in self.edits[path]:
            self.edits[path].append(edit)
            self.report.append(f"{path}:{literal.lineno}")

    def write(self) -> None:
        """Rewrite each file from its end to its beginning: no edit shifts the place of the next."""
        for path, edits in self.edits.items():
            source = path.read_bytes()
            if source != self.sources[path]:
                raise pytest.UsageError(f"{path} changed while its tests ran: nothing accepted there, run again")
            for edit in sorted(edits, reverse=True):
                source = source[: edit.begin] + edit.text + source[edit.end :]
            path.write_bytes(source)


def _call_in_progress(source: bytes, frame: FrameType) -> ast.Call | None:
    """The call that ``frame`` is executing, found by where it ends: unique also for calls within calls."""
    positions = inspect.getframeinfo(frame, context=0).positions
    assert positions is not None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) == (
            positions.end_lineno,
            positions.end_col_offset,
        ):
            return node
    return None


def _expected_literal(call: ast.Call) -> ast.Constant | None:
    candidates = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "expected")]
    return next((node for node in candidates if isinstance(node, ast.Constant)), None)


def _edit(source: bytes, call: ast.Call, literal: ast.Constant, text: str) -> Edit:
    """Replace the literal where it has a line to itself, else all arguments, laid out as ``ruff format`` wants them."""
    lines = source.splitlines(keepends=True)

    def place(line: int | None, column: int | None) -> int:
        assert line is not None
        assert column is not None
        return sum(map(len, lines[: line - 1])) + column

    begin, end = place(literal.lineno, literal.col_offset), place(literal.end_lineno, literal.end_col_offset)
    if not lines[literal.lineno - 1][: literal.col_offset].strip() or literal not in call.args:
        return Edit(begin, end, _quoted(text, _indent(lines[literal.lineno - 1])).encode())
    first = call.args[0]
    begin, end = place(first.lineno, first.col_offset), place(call.end_lineno, call.end_col_offset)
    actual = source[begin : place(first.end_lineno, first.end_col_offset)].decode()
    outer = _indent(lines[first.lineno - 1])
    inner = outer + " " * 4
    return Edit(begin, end, f"\n{inner}{actual},\n{inner}{_quoted(text, inner)},\n{outer})".encode())


def _indent(line: bytes) -> str:
    return line[: len(line) - len(line.lstrip())].decode()


def _quoted(text: str, indent: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""\n{textwrap.indent(escaped, indent)}\n{indent}"""'


_accepted: Accepted | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite expected texts that differ from the actual ones")


def pytest_configure(config: pytest.Config) -> None:
    global _accepted
    if not config.getoption("accept"):
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--accept rewrites test files, which takes a single process: leave out -n")
    _accepted = Accepted()


def pytest_sessionfinish() -> None:
    if _accepted is not None:
        _accepted.write()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _accepted is not None and _accepted.report:
        terminalreporter.section("accepted: read them before you commit")
        for place in _accepted.report:
            terminalreporter.line(place)
