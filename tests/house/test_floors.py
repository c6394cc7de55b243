"""The floors of the house: tools over backends over passes over the IR, by statement and by string, without circles.

The import contracts in ``pyproject.toml`` say which room may know which; a linter of imports sees statements alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [
    {"shear_ir": ROOT / "shear_ir"},
    {"shear_passes": ROOT / "passes" / "shear_passes"},
    {"shear_backends": ROOT / "backends" / "shear_backends", "shear_training": ROOT / "backends" / "shear_training"},
    {"shear_tools": ROOT / "tools" / "shear_tools"},
]
FACE = "shear_ir"
"""What users import: it looks names up on every floor, by string."""


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in (item for floor in FLOORS for item in floor.items()):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = _modules()
HEIGHT = {package: height for height, floor in enumerate(FLOORS) for package in floor}


def _typing_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under ``if TYPE_CHECKING``, which no run imports."""
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for block in guarded for statement in block.body for inner in ast.walk(statement)}


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that this one imports, wherever in it, and those whose names it holds as strings."""
    skipped = _typing_only(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                within = [f"{module}.{alias.name}" for alias in aliases]
                names = [name if name in MODULES else module for name in within]
            case ast.Constant(value=str(text)):
                names = [text]
        if node not in skipped:
            yield from (name for name in names if name in MODULES)


EDGES = {
    (name, other)
    for name, path in MODULES.items()
    if name != FACE
    for other in imported(ast.parse(path.read_text(encoding="utf-8")))
    if other not in (name, FACE)
}


def test_no_import_climbs() -> None:
    def height(name: str) -> int:
        return HEIGHT[name.partition(".")[0]]

    assert [f"{a} -> {b}" for a, b in sorted(EDGES) if height(b) > height(a)] == []


def _room(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


@pytest.mark.parametrize("of", ["files", "folders"])
def test_imports_run_in_no_circle(of: str) -> None:
    edges = EDGES if of == "files" else {(_room(a), _room(b)) for a, b in EDGES if _room(a) != _room(b)}
    circles = [sorted(c) for c in nx.strongly_connected_components(nx.DiGraph(list(edges))) if len(c) > 1]
    assert circles == []


@pytest.mark.parametrize(
    "code",
    [
        "import shear_tools.cli.app",
        "from shear_tools.api import pipeline",
        "def f():\n    from shear_tools.api.pipeline import trace",
        "HOME = 'shear_tools.api.pipeline'",
        "importlib.import_module('shear_tools.api.pipeline').trace",
    ],
)
def test_an_import_is_seen_however_it_is_said(code: str) -> None:
    assert {"shear_tools.cli.app", "shear_tools.api.pipeline"} & set(imported(ast.parse(code)))


def test_types_are_no_imports() -> None:
    assert not set(imported(ast.parse("if TYPE_CHECKING:\n    from shear_tools.api import pipeline")))


def test_the_face_tells_checkers_of_types_what_it_finds() -> None:
    import shear_ir

    tree = ast.parse(MODULES[FACE].read_text(encoding="utf-8"))
    typed = {
        alias.asname: node.module
        for node in _typing_only(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == shear_ir._HOMES
