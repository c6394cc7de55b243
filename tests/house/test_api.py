"""The public names with their signatures: what a change of them would break."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import shear_ir as sir
from tests.golden import expect_file


def lines() -> Iterator[str]:
    for name in sir.__all__:
        value = getattr(sir, name)
        if not inspect.isclass(value):
            yield f"{name}{inspect.signature(value)}"
            continue
        bases = ", ".join(b.__name__ for b in value.__bases__ if b is not object)
        yield f"class {name}({bases})"
        for part, member in sorted(vars(value).items()):
            if part.startswith("_") and part != "__init__":
                continue
            if callable(member) or isinstance(member, (classmethod, staticmethod)):
                yield f"    {part}{inspect.signature(getattr(value, part))}"
            elif isinstance(member, property) or hasattr(member, "func"):
                yield f"    {part}: property"


def test_the_public_names_are_these() -> None:
    expect_file("\n".join(lines()) + "\n", "api.txt")
