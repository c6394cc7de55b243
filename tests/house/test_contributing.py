"""What CONTRIBUTING.md shows is what the code has, and its example of a test works."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shear_passes.ops import elementwise, linear

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("module", [elementwise, linear], ids=["row", "rule"])
def test_the_row_and_the_rule_shown_are_in_the_code(module: object) -> None:
    source = inspect.getsource(module)  # type: ignore[arg-type]
    assert sum(block.strip() in source for block in BLOCKS) == 1


def test_the_golden_test_shown_is_filled_in_and_then_passes(tmp_path: Path) -> None:
    (example,) = [block for block in BLOCKS if "expect(" in block]
    file = tmp_path / "test_example.py"
    file.write_text(example)
    paths = [str(ROOT), *(str(ROOT / part) for part in ("passes", "backends", "tools"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
    command += ["-p", "tests.golden"]
    done = [
        subprocess.run([*command, *more], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        for more in ([], ["--accept"], [])
    ]
    assert [run.returncode for run in done] == [1, 0, 0], [run.stdout[-2000:] for run in done]
    assert "zero:" in file.read_text() or "->" in file.read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:passes|tools|tests|shear_ir)/[\w/.]+)`", TEXT))))
def test_a_place_named_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_names_in_the_table_are_defined_where_it_says() -> None:
    said = re.findall(r"`(\w+)` in `([\w/]+\.py)`", TEXT)
    assert len(said) > 3
    for name, place in said:
        files = list(ROOT.glob(f"*/*/{place}")) + list(ROOT.glob(f"*/{place}")) + list(ROOT.glob(place))
        assert any(name in file.read_text(encoding="utf-8") for file in files), f"{name} in {place}"
