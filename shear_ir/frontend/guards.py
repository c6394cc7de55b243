"""What a model's forward asks of the sizes of its inputs, found by running it on shapes whose sizes are symbols."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from shear_ir.frontend.feeds import call, tensors_in, uncached, with_tensors
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.shapes import on_shapes


@dataclass(frozen=True)
class Guard:
    """A condition on the sizes of inputs that held, as ``x.shape[1] <= 8``; where it does not, forward may do more."""

    condition: Any
    symbols: Mapping[Any, tuple[str, int]]

    @property
    def numbers(self) -> frozenset[int]:
        """The whole numbers in it."""
        return frozenset(int(n) for n in self.condition.atoms() if getattr(n, "is_Integer", False))

    def holds(self, feed: Inputs) -> bool:
        """Whether it holds for the sizes of ``feed``, an input for the same arguments."""
        given = tensors_in(feed)
        return bool(self.condition.subs({s: given[name].shape[dim] for s, (name, dim) in self.symbols.items()}))

    def __str__(self) -> str:
        named: Any = {s: f"{name}.shape[{dim}]" for s, (name, dim) in self.symbols.items()}
        text = str(self.condition)
        for symbol in sorted(named, key=lambda s: -len(str(s))):
            text = text.replace(str(symbol), named[symbol])
        return text


def size_guards(model: nn.Module, feed: Inputs) -> tuple[Guard, ...]:
    """What ``forward`` asked of the sizes of ``feed``, as far as it runs on symbols.

    A size that has to be one number, such as that of channels, leaves no choice.
    """
    env, symbols = ShapeEnv(), dict[Any, tuple[str, int]]()
    names = {id(tensor): name for name, tensor in tensors_in(feed).items()}

    def symbolic(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
        name = names[id(tensor)]
        made = mode.from_tensor(tensor, symbolic_context=context, source=LocalSource(name))
        for dim, size in enumerate(made.shape):
            if isinstance(size, torch.SymInt):
                symbols.setdefault(size.node.expr, (name, dim))
        return made

    # What forward cannot do with symbols, as torch's own code cannot in places, ends the search.
    with contextlib.suppress(Exception), on_shapes(model, {}, env) as (copy, _, mode):
        call(copy().eval(), with_tensors(feed, lambda tensor: symbolic(mode, tensor)), **uncached(model))
    found: dict[str, Guard] = {}
    for asked in env.guards:
        condition = asked.expr
        used = {s: symbols[s] for s in condition.free_symbols if s in symbols}
        if condition.func.__name__ == "Equality" and len(used) == 1 and "Mod(" not in str(condition):
            continue
        if used and len(used) == len(condition.free_symbols):
            guard = Guard(condition, used)
            found.setdefault(str(guard), guard)
    return tuple(found.values())
