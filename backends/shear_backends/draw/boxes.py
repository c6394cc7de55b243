"""The boxes of a picture: the tensors of each module, and which box a read of a tensor belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from shear_backends.draw.composed import composed_parts
from shear_backends.draw.model import Box, Row
from shear_ir.axes import atoms
from shear_ir.nodes import module_path
from shear_ir.paths import inside, last, parent, split
from shear_ir.program import Param, Program
from shear_passes.analysis.find_groups import Group, Groups

CONTAINERS = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")


class Boxes:
    """The boxes by path, and the box of each read: a tied tensor has one in every module that reads it."""

    def __init__(self, program: Program, groups: Groups, only: Group | None = None) -> None:
        self.program = program
        focus = only.parameters if only else ()
        shown = {p.name for p in program.params.values() if p.name in focus or _worth_a_row(p, groups)}
        self._uses = {name: _uses(program, name) for name in program.params if name in shown}
        self._parts = composed_parts(program)
        names = [use for uses in self._uses.values() for use in uses]
        owners = {parent(name) for name in names}
        self._inner = {up for owner in owners for up in _ancestors(owner)} & owners
        wanted = set(focus or self._uses)
        self.by_path: Mapping[str, Box] = self._boxes(groups, wanted)

    def of_read(self, node: fx.Node, reader: fx.Node) -> str | None:
        """Path of the box that holds the tensor of placeholder ``node`` as ``reader`` sees it; None when not drawn."""
        param = self.program.param(node)
        if param is None or param.name not in self._uses:
            return None
        uses = self._uses[param.name]
        name = _name_at(param, reader)
        path = self._path(name if name in uses else uses[0])
        return path if path in self.by_path else None

    def _path(self, name: str) -> str:
        """The box of a tensor: that of its module, or its own where the module has others inside.

        A composed operator is one box.
        """
        if name in self._parts:
            return self._parts[name].path
        owner = parent(name)
        return name if owner in self._inner or not owner else owner

    def _boxes(self, groups: Groups, wanted: set[str]) -> dict[str, Box]:
        rows: dict[str, list[Row]] = {}
        for name, uses in self._uses.items():
            if name not in wanted:
                continue
            param = self.program.params[name]
            for use in uses:
                tied = uses[0] if use != uses[0] else ""
                part = self._parts.get(use)
                row = Row((part.name if part else last(use),), (param,), groups.axes.of_param[name], tied)
                _merge(rows.setdefault(self._path(use), []), row, groups)
        return {path: self._box(path, tuple(found)) for path, found in rows.items()}

    def _box(self, path: str, rows: tuple[Row, ...]) -> Box:
        module = parent(path)
        info = self.program.modules.get(path)
        title_of = next((self._parts[p.name].title for p in rows[0].params if p.name in self._parts), "")
        klass = title_of or (info.type.rpartition(".")[2] if info else rows[0].params[0].kind)
        return Box(path, module, title(self.program, path), klass, rows)


def title(program: Program, path: str) -> str:
    """The last part of a path, with the container before it: ``layers.0``."""
    up, part = split(path)
    return f"{title(program, up)}.{part}" if up and is_container(program, up) else part


def is_container(program: Program, path: str) -> bool:
    """Whether a module only holds others and says nothing itself."""
    info = program.modules.get(path)
    return info is not None and info.type.rpartition(".")[2] in CONTAINERS


def _worth_a_row(param: Param, groups: Groups) -> bool:
    """Parameters are; buffers where an axis of theirs is also one of a parameter."""
    if param.kind == "parameter":
        return True
    owners = [groups.by_axis.get(a) for dim in groups.axes.of_param[param.name] for a in atoms(dim)]
    kinds = {groups.program.params[name].kind for group in owners if group for name in group.parameters}
    return "parameter" in kinds


def _uses(program: Program, name: str) -> list[str]:
    """The names under which modules read a tensor, in order; its canonical name when nothing reads it."""
    param = program.params[name]
    if not param.aliases:
        return [name]
    node = program.placeholder_of.get(name)
    found = dict.fromkeys(_name_at(param, reader) for reader in node.users) if node else {}
    return list(found) or [name]


def _name_at(param: Param, reader: fx.Node) -> str:
    """What the reading module calls the tensor: the name that lies in it, or else below it, or else the first."""
    place = module_path(reader)
    names = (param.name, *param.aliases)
    exact = next((n for n in names if parent(n) == place), None)
    return exact or next((n for n in names if inside(n, place)), param.name)


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def _merge(rows: list[Row], new: Row, groups: Groups) -> None:
    """Add a row, or join one whose tensors have the same dims: a norm's weight, bias and statistics are one row."""
    text = [groups.show(d) for d in new.dims]
    for place, row in enumerate(rows):
        if row.tied == new.tied and [groups.show(d) for d in row.dims] == text:
            rows[place] = Row((*row.names, *new.names), (*row.params, *new.params), row.dims, row.tied)
            return
    rows.append(new)
