"""Dropping blocks: the readers of a block's exit read its entry, and what only the block needed goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, fx

from shear_ir.errors import PlanError
from shear_ir.manager import AnalysisManager, Rewrite
from shear_ir.plans import renumbered
from shear_ir.program import ModuleInfo, Program
from shear_passes.analysis.block_groups import BLOCK_KINDS, Gone, Unit, gone_with
from shear_passes.analysis.find_groups import FindGroups, Groups


@dataclass(frozen=True)
class DropBlocks(Rewrite):
    """Removes the blocks whose module paths match ``blocks`` (globs); layers behind them move up in their list."""

    blocks: tuple[str, ...]

    requires = (FindGroups,)

    def run(self, program: Program, analyses: AnalysisManager) -> Program:
        """Raises ``PlanError`` for a pattern that matches no block, and for a block that cannot go."""
        units = self._units(analyses)
        return moved_up(without_blocks(program, units), gone_with(program, units))

    def carry(self, weights: Mapping[str, Tensor] | None, analyses: AnalysisManager) -> Mapping[str, Tensor] | None:
        """The weights of what is left, under their new names."""
        return None if weights is None else left_of(weights, gone_with(analyses.program, self._units(analyses)))

    def _units(self, analyses: AnalysisManager) -> list[Unit]:
        groups = analyses.get(FindGroups())
        chosen = matching(groups, self.blocks)
        stuck = next((unit for unit in chosen if unit.reason), None)
        if stuck is not None:
            raise PlanError(f"{stuck.path} cannot be removed: {stuck.reason}")
        return chosen


def matching(groups: Groups, patterns: Sequence[str]) -> list[Unit]:
    """The units whose paths match; of a layer and its parts with one path, the layer. Raises for an idle pattern."""
    chosen: dict[str, Unit] = {}
    for pattern in patterns:
        found = [u for kind in BLOCK_KINDS for g in groups.blocks if g.kind == kind for u in g.units
                 if fnmatchcase(u.path, pattern)]  # fmt: skip
        if not found:
            paths = [u.path for g in groups.blocks for u in g.units]
            raise PlanError(
                f"no block matches '{pattern}'; "
                + (f"blocks are named like {', '.join(paths[:2])}" if paths else "the model has none")
            )
        for unit in found:
            chosen.setdefault(unit.path, unit)
    return list(chosen.values())


def without_blocks(program: Program, units: Sequence[Unit]) -> Program:
    """``program`` without the units, under the names that nodes and tensors have; linear in the number of nodes."""
    if not units:
        return program
    gone = gone_with(program, units)
    exits = {block.exit: block.entry for unit in units for block in unit.blocks}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        given = node.op == "placeholder" and node.name not in program.of_placeholder
        lost = program.of_placeholder.get(node.name) in gone.parameters
        if node in exits:
            env[node] = env[exits[node]]
        elif given or not (lost or node.name in gone.nodes):
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].name = node.name
    left = {node.name for node in graph.nodes}
    return replace(
        program,
        source=None,
        graph=graph,
        types={name: types for name, types in program.types.items() if name in left},
        params={name: param for name, param in program.params.items() if name not in gone.parameters},
        of_placeholder={node: name for node, name in program.of_placeholder.items() if node in left},
        constants={name: tensor for name, tensor in program.constants.items() if name not in gone.parameters},
    )


def moved_up(program: Program, gone: Gone) -> Program:
    """``program``, from which ``gone`` has been removed, with the names that modules behind it get in their lists."""
    if not gone.modules:
        return program
    names = {name: _new(name, gone.modules) for name in (*program.params, *program.modules)}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].name = node.name
        env[node].meta = {**node.meta, "nn_module_stack": _stack(node, gone.modules)}
    return replace(
        program,
        source=None,
        graph=graph,
        params={
            names[name]: replace(p, name=names[name], aliases=tuple(_kept_names(p.aliases, gone.modules)))
            for name, p in program.params.items()
        },
        of_placeholder={node: names[name] for node, name in program.of_placeholder.items()},
        constants={names[name]: tensor for name, tensor in program.constants.items()},
        modules={
            names[path]: ModuleInfo(names[path], info.type)
            for path, info in program.modules.items()
            if renumbered(path, gone.modules) is not None
        },
    )


def left_of(tensors: Mapping[str, Tensor], gone: Gone) -> dict[str, Tensor]:
    """The tensors that are left, under the names they get."""
    new = {name: renumbered(name, gone.modules) for name in tensors if name not in gone.parameters}
    return {name: tensors[old] for old, name in new.items() if name is not None}


def _new(name: str, gone: Collection[str]) -> str:
    """The new name of what is left; a tensor that outlives its module keeps its own."""
    return renumbered(name, gone) or name


def _kept_names(names: Sequence[str], gone: Collection[str]) -> list[str]:
    return [new for name in names if (new := renumbered(name, gone)) is not None]


def _stack(node: fx.Node, gone: Collection[str]) -> dict[str, tuple[str, object]]:
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (_new(str(path), gone), *rest) for key, (path, *rest) in stack.items()}
