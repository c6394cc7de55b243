"""Operators are described in ``ops/``, one row each: what else knows one by name has a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from shear_passes.ops.traits import known_rows

PASSES = Path(__file__).parents[2] / "passes" / "shear_passes"
PATTERNS = {
    "analysis/lora.py": "sums of a base and adapters, as PEFT composes them of several operators",
    "analysis/lora_maps.py": "the maps that they are made of",
    "analysis/lora_magnitude.py": "the magnitudes of DoRA, made of a dozen",
    "analysis/lora_experts.py": "adapters of stacked experts",
    "rewrite/rescale_norm.py": "an RMS norm, written out in operators, whose eps and weight are rescaled",
    "repair/centred_stream.py": "which operators of a stream keep its mean at zero",
    "rewrite/shear.py": "an index_select that the rewrite itself puts in",
}


def operators(tree: ast.Module) -> Iterator[str]:
    """Names of operators: strings and attributes of torch.ops, and collections of the names of rows."""
    rows = known_rows()
    types = {part for node in ast.walk(tree) if isinstance(node, ast.Subscript) for part in ast.walk(node.slice)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if text.startswith(("aten.", "aten::")) and " " not in text:
                if text != "aten.":
                    yield text
            case ast.Attribute() if ast.unparse(node).startswith(("torch.ops.aten.", "aten.")):
                yield ast.unparse(node)
            case ast.Set(elts=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts) if (
                len(parts) > 1 and node not in types
            ):
                names = [part.value for part in parts if isinstance(part, ast.Constant)]
                if len(names) == len(parts) and all(isinstance(n, str) and n in rows for n in names):
                    yield str(names)


def named() -> dict[str, list[str]]:
    files = {str(path.relative_to(PASSES)): path for path in sorted(PASSES.rglob("*.py"))}
    outside = {name: path for name, path in files.items() if not name.startswith("ops/")}
    found = {name: list(operators(ast.parse(path.read_text(encoding="utf-8")))) for name, path in outside.items()}
    return {name: names for name, names in found.items() if names}


def test_only_patterns_name_operators() -> None:
    assert named().keys() == PATTERNS.keys()


@pytest.mark.parametrize(
    "code",
    ["x == 'aten.relu.default'", "torch.ops.aten.relu.default", "KEPT = {'relu', 'softplus'}", "('sum', 'mean')"],
)
def test_a_name_is_seen_however_it_is_said(code: str) -> None:
    assert list(operators(ast.parse(code)))
