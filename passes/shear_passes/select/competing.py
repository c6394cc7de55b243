"""Selection in which units of several groups compete: layers that matter less lose more, and end up of unlike sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shear_ir.program import Program
from shear_passes.analysis.find_groups import Group
from shear_passes.importance import Scores
from shear_passes.importance.base import Score
from shear_passes.select.by_ratio import SelectByRatio, Shares


@dataclass(frozen=True)
class SelectGlobal(SelectByRatio):
    """All units of all groups compete; ``SelectByRatio`` has the options.

    Scores are standardised within their group, ``(s - mean) / std``, so that a head can be ranked against a channel
    and one layer against another; a unit counts as many parameters as it has (FLAP's AL-AM, An et al. 2024).
    """

    def wanted(self, groups: Sequence[Group], scores: Scores, program: Program) -> Shares:
        """The share is one of the parameters of all units."""
        scaled = [_standardised(scores[g]) for g in groups]
        sizes = np.repeat([float(g.parameters_per_unit) for g in groups], [g.size for g in groups])
        return lambda share: _ranked(groups, scaled, sizes, share)


@dataclass(frozen=True)
class SelectIsomorphic(SelectByRatio):
    """Units compete with those of groups of the same structure; ``SelectByRatio`` has the options.

    Groups are alike when they are of one kind and own equal slices of equal tensors (isomorphic pruning, Fang et al.
    2024). Each class loses the same share of its units; scores are compared over the root mean square of their group.
    """

    def wanted(self, groups: Sequence[Group], scores: Scores, program: Program) -> Shares:
        """The share is one of the units of each class."""
        classes: dict[object, list[Group]] = {}
        for group in groups:
            classes.setdefault(_structure(program, group), []).append(group)
        scaled = {g: s / (np.sqrt(np.mean(_finite(s) ** 2)) or 1.0) for g in groups for s in [scores[g]]}

        def wanted(share: float) -> Mapping[Group, float]:
            found: dict[Group, float] = {}
            for alike in classes.values():
                ones = np.ones(sum(g.size for g in alike))
                found |= _ranked(alike, [scaled[g] for g in alike], ones, share)
            return found

        return wanted


def _standardised(scores: Score) -> Score:
    known = _finite(scores)
    found: Score = (scores - known.mean()) / (known.std() or 1.0)
    return found


def _finite(scores: Score) -> Score:
    """The scores that are numbers: a unit of infinite score goes last, or first, and says nothing of the others."""
    found: Score = scores[np.isfinite(scores)]
    return found if len(found) else np.zeros(1)


def _structure(program: Program, group: Group) -> object:
    """What two groups have in common when a unit of one looks like a unit of the other."""
    owned = Counter((program.params[s.parameter].type.shape, s.dim) for s in group.slices)
    return group.kind, group.size, frozenset(owned.items())


def _ranked(groups: Sequence[Group], scores: Sequence[Score], sizes: Score, share: float) -> dict[Group, float]:
    """How many units of each group stay when the lowest scores go, up to ``share`` of the sum of ``sizes``."""
    pooled = np.concatenate(scores)
    order = np.argsort(pooled, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(sizes[order])])
    # The least excess: a unit goes when the units up to it take no more than the share, but for rounding.
    gone = np.searchsorted(before[1:], share * before[-1] * (1 + 1e-12), side="right")
    stays = np.ones(len(pooled), dtype=bool)
    stays[order[:gone]] = False
    ends = np.cumsum([g.size for g in groups])[:-1]
    return {g: float(np.count_nonzero(part)) for g, part in zip(groups, np.split(stays, ends), strict=True)}
