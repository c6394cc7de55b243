"""The modules around what is drawn, as nested clusters; those that only wrap one other are one cluster with it."""

from __future__ import annotations

from collections.abc import Iterable

from shear_backends.draw.boxes import is_container, title
from shear_backends.draw.fold import Folding
from shear_backends.draw.model import Box, Cluster, Item
from shear_ir.paths import parent
from shear_ir.printer import numbers
from shear_ir.program import Program


def grow(program: Program, items: Iterable[Item], folding: Folding) -> Cluster:
    """The root cluster with every item in the innermost module that is drawn."""
    items = list(items)
    drawn = {up for item in items if isinstance(item, Box) for up in _upwards(item.module)}
    root = Cluster("", program.owner, "")
    clusters = {"": root}
    for item in items:
        _home(program, item.module, drawn, clusters, folding).content.append(item)
    return _without_wrappers(root, top=True)


def label(program: Program, path: str, folding: Folding) -> tuple[str, str]:
    """The title of a module and the blocks it stands for, in words."""
    stands_for = folding.stands_for(path)
    if not stands_for:
        return title(program, path), ""
    up = parent(path)
    name = title(program, up) + " " if up and is_container(program, up) else ""
    return f"{name}{numbers(stands_for)}", f"{len(stands_for)} ×"


def _home(program: Program, module: str, drawn: set[str], clusters: dict[str, Cluster], folding: Folding) -> Cluster:
    while module and (module not in drawn or is_container(program, module)):
        module = parent(module)
    if module not in clusters:
        name, times = label(program, module, folding)
        info = program.modules.get(module)
        klass = info.type.rpartition(".")[2] if info else ""
        clusters[module] = Cluster(module, name, klass, times)
        _home(program, parent(module), drawn, clusters, folding).content.append(clusters[module])
    return clusters[module]


def _upwards(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _without_wrappers(cluster: Cluster, top: bool = False) -> Cluster:
    cluster.content = [_without_wrappers(c) if isinstance(c, Cluster) else c for c in cluster.content]
    only = cluster.content[0] if len(cluster.content) == 1 else None
    if top or cluster.times or not isinstance(only, Cluster) or only.times:
        return cluster
    return Cluster(only.path, f"{cluster.title}.{only.title}", only.klass, "", only.content)
