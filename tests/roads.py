"""The whole road on models of the zoo, each model traced once: plans, both backends, the masked original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shear_ir as sir
from shear_backends.graph.module import graph_module, named_tensors
from shear_backends.verify.numbers import Report, evaluation, masked, run, verify
from shear_ir.frontend.inputs import Inputs, example_inputs
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import BlockGroup, Group, Groups
from shear_passes.rewrite.cuts import build_plan
from shear_passes.rewrite.shear import shear_program, shear_tensors
from tests.zoo import FAMILIES

HEADS = ("kv_head", "query_group")


@dataclass(frozen=True, eq=False)
class Traced:
    """A model, its program and its groups; the inputs it was traced with."""

    model: nn.Module
    program: Program
    groups: Groups
    feed: Inputs

    @functools.cached_property
    def dynamic(self) -> Program:
        """The program for any batch and length."""
        return sir.trace(self.model, dynamic=True)

    def sheared_graph(self, plan: Plan) -> nn.Module:
        """The graph backend's result for any batch and length; one trace serves all plans, as long as it is alive."""
        assert self.dynamic
        return sir.shear(self.model, plan, backend="graph")

    def able(self, kind: str) -> list[Group]:
        """The groups of this kind that can lose units, in graph order."""
        return [g for g in self.groups if g.kind == kind and g.prunable and g.size > 1]

    def without(self, gone: dict[Group, Any]) -> Plan:
        """The plan in which each group loses the given units."""
        kept = {group: np.setdiff1d(np.arange(group.size), units) for group, units in gone.items()}
        return build_plan(self.groups, sir.analyses(self.program).get(MeasureCosts()), kept)

    def graph(self, plan: Plan) -> nn.Module:
        """The graph backend's result for inputs of the traced sizes, without tracing again."""
        return graph_module(
            shear_program(self.groups, plan), shear_tensors(named_tensors(self.model), self.groups, plan)
        )

    def report(self, small: nn.Module, plan: Plan) -> Report:
        """``small`` against the masked original, on the traced input alone."""
        return verify(self.model, small, plan, self.feed)


def trace(model: nn.Module, inputs: Any = None) -> Traced:
    """``model`` with what is known about it."""
    program = sir.trace(model, inputs)
    return Traced(model, program, sir.groups(program), inputs or example_inputs(model))


@functools.cache
def traced(name: str) -> Traced:
    """A family of the zoo; tests only read it."""
    return trace(FAMILIES[name]())


def outputs(model: nn.Module, feed: Inputs) -> tuple[Tensor, ...]:
    """What ``model`` predicts, in evaluation mode."""
    with evaluation(model), torch.no_grad():
        return run(model, feed)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether all outputs are equal, bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def greedy(model: nn.Module, plan: Plan, feed: Inputs, tokens: int) -> Tensor:
    """Greedy decoding by the masked original, the whole text anew for every token."""
    reference = masked(model, plan.kept, plan.routers, plan.gains)
    name = "decoder_input_ids" if "decoder_input_ids" in feed else "input_ids"
    # Every position is real, and a mask of ones would have to grow with the text.
    feed = {given: value for given, value in feed.items() if given != "attention_mask"}
    for _ in range(tokens):
        (logits,) = outputs(reference, feed)
        feed = {**feed, name: torch.cat([feed[name], logits[:, -1:].argmax(-1)], dim=1)}
    return feed[name]


def counted(model: nn.Module) -> int:
    """Number of elements of all parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def units(group: Group, share: float, seed: int = 0) -> Any:
    """Random units of a group: this share of it, and as few as can go at least; of blocks, such as can go."""
    free = [i for i in range(group.size) if not (isinstance(group, BlockGroup) and i in group.fixed)]
    step = group.multiple if group.size % group.multiple == 0 else 1
    return np.random.default_rng(seed).permutation(free)[: max(step, int(share * group.size) // step * step)]


Maker = Callable[[], nn.Module]
