"""A proof says neither too little nor too much: its calls alone tie the slices, and with one call less they do not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import count

import numpy as np
import pytest
from torch import fx

import shear_ir as sir
from shear_ir.axes import Axis, Dim, Indices, Product, atoms, axis, concat, owners, product
from shear_ir.program import Program
from shear_passes.analysis.explanation import At, Proof, Step
from shear_passes.analysis.find_groups import Groups
from shear_passes.analysis.infer_axes import Axes, Inference
from tests.roads import traced


class Only(Inference):
    """Axes of a program most of whose calls say nothing."""

    def __init__(self, program: Program, calls: Collection[str]) -> None:
        super().__init__(program)
        self.calls = calls

    def call(self, node: fx.Node) -> None:
        if node.name in self.calls or getattr(node.target, "__name__", "") == "getitem":
            super().call(node)
        else:
            shapes = [kind.shape for kind in self.program.types.get(node.name, ())]
            self.of_node[node.name] = [tuple(axis(size) for size in shape) for shape in shapes]


def paths(proof: Proof) -> Iterator[tuple[At, list[str]]]:
    """Each slice but the root, with the calls between them."""
    back: dict[At, tuple[At, Step]] = {}
    chains = [one for chain in proof.chains for one in (chain, *chain.alike)]
    for chain in chains:
        before = chain.start
        for step in chain.steps:
            assert step.to is not None
            back.setdefault(step.to, (before, step))
            before = step.to
    for chain in chains:
        at, calls = chain.end, list[str]()
        while at != proof.root:
            at, step = back[at]
            calls.append(step.node)
        yield chain.end, calls


def owner(dim: Dim, atom: Axis, part: str) -> Indices:
    """Which unit of one occurrence of an atom owns each index of a dim, -1 for none."""
    wanted = int(re.match(r"\d+", part)[0]) - 1 if part else 0  # type: ignore[index]
    mine, seen = Axis(atom.size), count()

    def renamed(dim: Dim) -> Dim:
        if isinstance(dim, Axis):
            return mine if dim is atom and next(seen) == wanted else dim
        return product(map(renamed, dim.factors)) if isinstance(dim, Product) else concat(map(renamed, dim.parts))

    (found,) = owners(renamed(dim), mine)
    return found


def tied(groups: Groups, axes: Axes, group: Axis, one: At, other: At) -> bool:
    """Whether under ``axes`` each unit of a group owns the same units of some atom in both slices, and no others do."""
    (a, of_a), (b, of_b) = (
        (axes.of_param[at.value[1:]][at.dim], owner(groups.axes.of_param[at.value[1:]][at.dim], group, at.part))
        for at in (one, other)
    )
    for atom in set(atoms(a)) & set(atoms(b)):
        for mine in owners(a, atom):
            for its in owners(b, atom):
                if _same(mine, of_a, its, of_b, group.size):
                    return True
    return False


def _same(mine: Indices, of_a: Indices, its: Indices, of_b: Indices, units: int) -> bool:
    sets = [(set(mine[of_a == u].tolist()), set(its[of_b == u].tolist())) for u in range(units)]
    return all(x == y and -1 not in x for x, y in sets) and not set.intersection(*(x for x, _ in sets[:2]))


def check(groups: Groups, name: str) -> int:
    """Every proof of one group; how many there are."""
    (proof,) = sir.explain(groups.program, name).proofs
    group = groups.by_name[name].axis
    done = 0
    for end, calls in paths(proof):
        assert tied(groups, Only(groups.program, calls).run(), group, proof.root, end), (name, end)
        gone = np.random.default_rng(done).choice(calls)
        fewer = Only(groups.program, [call for call in calls if call != gone]).run()
        assert not tied(groups, fewer, group, proof.root, end), (name, end, gone)
        done += 1
    return done


@pytest.mark.parametrize("name", ["llama_gqa", "gpt_neox", "bart", "resnet", "concat_and_split", "mixtral"])
def test_the_calls_of_a_proof_tie_its_slices_and_each_of_them_is_needed(name: str) -> None:
    family = traced(name)
    kinds: dict[str, str] = {}
    for group in family.groups.by_axis.values():
        if len(group.slices) > 1:
            kinds.setdefault(group.kind, group.name)
    assert sum(check(family.groups, group) for group in kinds.values()) > 2
