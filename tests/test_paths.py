"""Dotted paths of modules and tensors."""

from __future__ import annotations

import pytest

from shear_ir.paths import common, inside, last, parent, split


@pytest.mark.parametrize(
    ("path", "module", "part"), [("a.b.weight", "a.b", "weight"), ("weight", "", "weight"), ("", "", "")]
)
def test_a_path_is_its_module_and_its_last_part(path: str, module: str, part: str) -> None:
    assert split(path) == (parent(path), last(path)) == (module, part)


def test_inside_is_by_whole_parts() -> None:
    assert inside("layers.1.mlp", "layers.1")
    assert inside("layers.1", "layers.1")
    assert inside("layers.1", "")
    assert not inside("layers.10", "layers.1")
    assert not inside("layers", "layers.1")


def test_the_common_module_holds_all_and_exists() -> None:
    assert common(["enc.0.ffn", "enc.1.ffn"]) == "enc"
    assert common(["enc.ffn", "dec.ffn"]) == ""
    assert common(["layers.1", "layers.10"]) == "layers"
    assert common(["a.b"]) == "a.b"
    assert common([]) == ""
