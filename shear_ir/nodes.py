"""What a node of a traced graph says by itself: the module and the source line it came from, what it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import fx

_FRAME = re.compile(r'File "(.*)", line (\d+), in .*')
_MACHINERY = ("/torch/", "/peft/tuners/", "/shear_ir/frontend/")
"""Folders of code that runs a model and is no part of it."""


@dataclass(frozen=True)
class SourceLine:
    """A line of code; as text without the folder, which tells more of the machine than of the model."""

    file: str
    line: int
    code: str

    @property
    def place(self) -> str:
        """``modeling_llama.py:241``."""
        return f"{PurePath(self.file).name}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.code}"


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that were running when the node was traced, the whole model, an empty path, first."""
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return tuple(paths if paths[:1] == [""] else ["", *paths])


def module_path(node: fx.Node) -> str:
    """Path of the innermost module the node was traced in; empty at the root."""
    return module_stack(node)[-1]


def source_line(node: fx.Node) -> SourceLine | None:
    """The innermost line of the model's own source that made the node; None when unknown."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    for place in range(len(lines) - 2, -1, -1):
        frame = _FRAME.fullmatch(lines[place])
        if frame and not any(folder in frame[1] for folder in _MACHINERY):
            return SourceLine(frame[1], int(frame[2]), lines[place + 1])
    return None


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes a call reads, in the order of its arguments, repeated as often as they stand there."""
    found: list[fx.Node] = []

    def take(value: Any) -> Any:
        if isinstance(value, fx.Node):
            found.append(value)
        return value

    fx.map_arg((node.args, node.kwargs), take)
    return found
