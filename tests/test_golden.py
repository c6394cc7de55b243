"""``expect`` compares printed programs; ``--accept`` rewrites the test that called it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
HEADER = "from tests.golden import expect, expect_file\n\n\n"


def run(folder: Path, test: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on ``test``, the text of a test file, in a process of its own; without this suite's conftest."""
    (folder / "test_inner.py").write_text(HEADER + dedent(test), encoding="utf-8")
    return again(folder, *options)


def again(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the file that ``run`` left there."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-p", "tests.golden", *options]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # saves a second each
    }
    return subprocess.run(
        [*command, "test_inner.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def written(folder: Path) -> str:
    """The test file's text, without the header."""
    return (folder / "test_inner.py").read_text(encoding="utf-8").removeprefix(HEADER)


def test_layout_around_the_text_does_not_count(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        '''
        def test_it():
            expect("a\\n  b  \\n", """
                a
                  b
            """)
        ''',
    )
    assert result.returncode == 0, result.stdout


def test_a_difference_is_shown_and_the_file_left_alone(tmp_path: Path) -> None:
    result = run(tmp_path, 'def test_it():\n    expect("new", "old")\n')
    assert result.returncode == 1
    assert "-old\n+new\n" in result.stdout
    assert "pytest --accept" in result.stdout
    assert written(tmp_path) == 'def test_it():\n    expect("new", "old")\n'


def test_accept_rewrites_every_stale_text_and_the_next_run_passes(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        '''
        def test_one_line():
            expect("a\\nb", ""); expect("same", "same")

        def test_own_line():
            expect(
                str("ä" + str(1)),
                """
                old
                older
                """,
            )

        def test_hard_to_quote():
            expect('say """hi""" \\\\ there', expected="x")
        ''',
        "--accept",
    )
    assert result.returncode == 0, result.stdout
    assert "test_inner.py:6" in result.stdout
    assert written(tmp_path) == dedent(
        '''
        def test_one_line():
            expect(
                "a\\nb",
                """
                a
                b
                """,
            ); expect("same", "same")

        def test_own_line():
            expect(
                str("ä" + str(1)),
                """
                ä1
                """,
            )

        def test_hard_to_quote():
            expect('say """hi""" \\\\ there', expected="""
            say \\"\\"\\"hi\\"\\"\\" \\\\ there
            """)
        '''
    )
    assert again(tmp_path).returncode == 0


def test_accept_cannot_choose_between_two_texts(tmp_path: Path) -> None:
    result = run(tmp_path, 'def test_it():\n    for text in "ab":\n        expect(text, "a")\n', "--accept")
    assert result.returncode == 1
    assert "two different texts" in result.stdout
    assert 'expect(text, "a")' in written(tmp_path)


def test_accept_needs_a_literal(tmp_path: Path) -> None:
    result = run(tmp_path, 'def test_it():\n    text = "old"\n    expect("new", text)\n', "--accept")
    assert result.returncode == 1
    assert "literals only" in result.stdout


def test_accept_leaves_a_file_that_changed_meanwhile(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        """
        def test_it():
            expect("new", "old")
            with open(__file__, "a") as file:
                file.write("# edited")
        """,
        "--accept",
    )
    assert result.returncode == 4
    assert "changed while its tests ran" in result.stderr
    assert 'expect("new", "old")' in written(tmp_path)


def test_accept_refuses_several_processes(tmp_path: Path) -> None:
    result = run(tmp_path, 'def test_it():\n    expect("new", "old")\n', "--accept", "-p", "xdist", "-n", "1")
    assert result.returncode == 4
    assert "leave out -n" in result.stderr
    assert 'expect("new", "old")' in written(tmp_path)


def test_a_file_is_written_when_accepted_and_compared_otherwise(tmp_path: Path) -> None:
    dump = tmp_path / "dumps" / "tiny.txt"
    test = f"def test_it():\n    expect_file('  a\\n    b\\n', {str(dump)!r})\n"
    assert run(tmp_path, test).returncode == 1
    assert run(tmp_path, test, "--accept").returncode == 0
    assert dump.read_text(encoding="utf-8") == "a\n  b\n"
    assert run(tmp_path, test).returncode == 0
