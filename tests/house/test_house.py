"""Rules of the house that no linter knows: what may be imported where, and what no file may say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [
    ROOT / "shear_ir",
    ROOT / "passes" / "shear_passes",
    *sorted((ROOT / "backends").glob("shear_*")),
    ROOT / "tools" / "shear_tools",
]
TOOLS = ROOT / "tools"


def modules(*folders: Path) -> Iterator[tuple[str, ast.Module]]:
    """Each Python file under ``folders``: its path from the root, and its syntax tree."""
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def mentions(tree: ast.Module) -> Iterator[str]:
    """Every dotted name a module imports or reads: ``torch.export`` however it is spelt."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{name.name}" for name in names)
            case ast.Attribute():
                yield ast.unparse(node)


def offenders(forbidden: str, *folders: Path) -> list[str]:
    """``file: name`` for each mention of a name that matches ``forbidden``, a regular expression for its beginning."""
    pattern = re.compile(rf"(?:{forbidden})(?:\.|$)")
    return [f"{path}: {name}" for path, tree in modules(*folders) for name in mentions(tree) if pattern.match(name)]


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from shear_tools.cli import main; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder.parent) for folder in PACKAGES)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


def test_only_the_frontend_imports_torch_export() -> None:
    outside = [line for line in offenders(r"torch\.export", *PACKAGES) if not line.startswith("shear_ir/frontend/")]
    assert outside == []


def test_nothing_is_pickled() -> None:
    assert offenders(r"torch\.(load|save)|c?[pP]ickle|cloudpickle|dill|joblib|shelve|marshal", *PACKAGES) == []


def test_no_file_names_a_folder_of_this_machine() -> None:
    local = re.compile(rb"(?<![\w.})])/(?:work|root)(?![\w-])")
    files = [path for folder in [*PACKAGES, TOOLS] for path in sorted(folder.rglob("*")) if path.is_file()]
    named = [str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc" and local.search(path.read_bytes())]
    assert named == []


def test_every_public_name_is_importable() -> None:
    public = importlib.import_module("shear_ir")
    assert public.__all__
    assert [name for name in public.__all__ if getattr(public, name, None) is None] == []


def test_every_module_says_what_it_is() -> None:
    assert [path for path, tree in modules(*PACKAGES, TOOLS) if not ast.get_docstring(tree)] == []


def test_workers_are_given_whole_groups_of_tests(request: pytest.FixtureRequest) -> None:
    # Without a sound they are given tests one by one where pytest and xdist do not know each other, and trace all anew.
    if not request.config.getoption("loadgroup", False):
        pytest.skip("one worker, or none that were asked to keep groups together")
    assert request.node.nodeid.endswith(f"@{request.path}")
