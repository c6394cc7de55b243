"""Values that forward makes without parameters, such as ALiBi slopes: their removed entries are dropped on the way.

Python code makes such a value from a count of heads, and from fewer heads it would make other numbers. So the module
that makes it keeps its count, and each module that is handed the value takes the kept entries of it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from shear_ir.axes import Axis, Dim, Mask, atoms, mask, resolve
from shear_ir.errors import ShearingError
from shear_ir.frontend.feeds import tensors_in
from shear_ir.frontend.inputs import Inputs
from shear_ir.nodes import module_path
from shear_ir.paths import inside
from shear_passes.analysis.find_groups import Groups


@dataclass(frozen=True)
class Gather:
    """Before ``module`` runs, argument ``argument`` keeps the entries ``kept`` of every ``period`` along ``dim``."""

    module: str
    argument: str | int
    dim: int
    period: int
    kept: tuple[int, ...]


class _Hook:
    """A forward pre-hook that takes the kept entries; a class, so that models with it can be copied."""

    def __init__(self, gather: Gather) -> None:
        self.gather = gather

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.gather.argument
        value = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
        if not isinstance(value, Tensor) or value.shape[self.gather.dim] % self.gather.period:
            return None
        taken = self._take(value)
        if isinstance(place, str):
            return args, {**kwargs, place: taken}
        return (*args[:place], taken, *args[place + 1 :]), kwargs

    def _take(self, value: Tensor) -> Tensor:
        dim, period = self.gather.dim, self.gather.period
        kept = torch.tensor(self.gather.kept, device=value.device)
        shape = value.shape
        unfolded = value.reshape(*shape[:dim], shape[dim] // period, period, *shape[dim + 1 :])
        taken = unfolded.index_select(dim + 1, kept)
        return taken.flatten(dim, dim + 1)


def install(model: nn.Module, gathers: list[Gather]) -> None:
    """Register the hooks on ``model``."""
    for gather in gathers:
        model.get_submodule(gather.module).register_forward_pre_hook(_Hook(gather), with_kwargs=True)


def find_gathers(model: nn.Module, groups: Groups, masks: Mapping[Axis, Mask], feed: Inputs) -> list[Gather]:
    """Which arguments of which modules carry a cut axis although no parameter made them.

    The value is found again among the arguments a module really gets, by running ``model`` and the traced graph on
    the same input. Raises ``ShearingError`` when it is not there.
    """
    crossings = list(_crossings(groups, masks))
    if not crossings:
        return []
    values = _values(groups, {node for node, _ in crossings}, feed)
    calls = _calls(model, {path for _, path in crossings}, feed)
    gathers: dict[tuple[str, str | int, int], Gather] = {}
    for node, path in crossings:
        argument = _argument(calls.get(path, {}), values[node])
        if argument is None:
            raise ShearingError(
                f"{path} uses %{node.name}, made from a number of heads or channels that the plan changes, and it is "
                "not one of its arguments: use the graph backend"
            )
        for dim, (period, kept) in _periods(groups.axes.dims(node), masks).items():
            gathers[path, argument, dim] = Gather(path, argument, dim, period, kept)
    return list(gathers.values())


def _crossings(groups: Groups, masks: Mapping[Axis, Mask]) -> Iterator[tuple[fx.Node, str]]:
    """Values that no parameter made and that carry a cut axis, with the topmost other module that reads each."""
    program = groups.program
    free: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "placeholder":
            param = program.param(node)
            if param is None or param.kind == "constant":
                free.add(node)
        elif node.op == "call_function" and all(n in free for n in node.all_input_nodes):
            free.add(node)
    seen: set[tuple[fx.Node, str]] = set()
    for node in free:
        if not any(a in masks for d in groups.axes.dims(node) for a in atoms(d)):
            continue
        maker = module_path(node)
        for user in node.users:
            path = _outermost(user, maker)
            if path is not None and (node, path) not in seen:
                seen.add((node, path))
                yield node, path


def _outermost(reader: fx.Node, maker: str) -> str | None:
    """The highest module called on the way to ``reader`` that does not contain ``maker``; None when there is none."""
    for path, _ in (reader.meta.get("nn_module_stack") or {}).values():
        if path and not inside(maker, path):
            return str(path)
    return None


def _values(groups: Groups, wanted: set[fx.Node], feed: Inputs) -> dict[fx.Node, Tensor]:
    """The values of parameter-free nodes for ``feed``, run alone."""
    program = groups.program
    given = tensors_in(feed)
    found: dict[fx.Node, Any] = {}
    stack = list(wanted)
    needed: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in program.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            name = program.of_placeholder.get(node.name)
            found[node] = program.constants[name] if name is not None else given[str(node.target)]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return {node: found[node] for node in wanted}


def _calls(model: nn.Module, paths: set[str], feed: Inputs) -> dict[str, dict[str | int, Any]]:
    from shear_backends.verify.numbers import evaluation, run

    calls: dict[str, dict[str | int, Any]] = {}
    hooks = []
    for path in paths:

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            given: dict[str | int, Any] = dict(enumerate(args))
            given.update(kwargs)
            calls.setdefault(path, given)

        hooks.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        with evaluation(model), torch.no_grad():
            run(model, feed)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _argument(call: Mapping[str | int, Any], value: Tensor) -> str | int | None:
    for name, given in call.items():
        if isinstance(given, Tensor) and given.shape == value.shape and torch.equal(given, value.to(given.dtype)):
            return name
    return None


def _periods(dims: tuple[Dim, ...], masks: Mapping[Axis, Mask]) -> dict[int, tuple[int, tuple[int, ...]]]:
    """For each dim that is cut: the size of the part that repeats, and what is kept of it."""
    found = {}
    for place, dim in enumerate(dims):
        stays = mask(dim, masks)
        if stays.all():
            continue
        period = resolve(dim).size
        # A leading batch factor varies with the input; what repeats under it does not.
        for size in range(1, len(stays)):
            if len(stays) % size == 0 and np.array_equal(stays, np.tile(stays[:size], len(stays) // size)):
                period = size
                break
        found[place] = (period, tuple(int(i) for i in np.flatnonzero(stays[:period])))
    return found
