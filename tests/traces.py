"""Traces for tests that are about something else: models of one structure share one, as their graphs are one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from shear_backends.module import depth, judge
from shear_backends.store import readback
from shear_backends.verify import masked_blocks
from shear_ir.frontend import export
from shear_ir.frontend.feeds import inputs_of, kept
from shear_ir.frontend.state import ModelState
from shear_ir.program import Program
from shear_tools.api import pipeline

_KNOWN: OrderedDict[Hashable, Program] = OrderedDict()
_MOST = 96
_TRACING = ((pipeline, "_trace"), (judge, "trace"), (masked_blocks, "trace"), (depth, "trace"), (readback, "trace"))


@contextmanager
def shared_traces(*, modules: bool = True) -> Iterator[None]:
    """Within it, a model is traced once, whatever its weights are; one whose forward was changed, each time anew.

    ``modules``: those that no config describes, too, which are told apart by their plain attributes.
    """
    with pytest.MonkeyPatch.context() as patched:
        for place, name in _TRACING:
            patched.setattr(place, name, _remembering(export.trace, modules))
        yield


def _remembering(trace: Callable[..., Program], modules: bool) -> Callable[..., Program]:
    def remembered(model: nn.Module, inputs: Any = None, *, dynamic: bool = False, ways: bool = False) -> Program:
        if not (modules or hasattr(model, "config")) or any(map(_changed, model.modules())):
            return trace(model, inputs, dynamic=dynamic, ways=ways)
        feed = inputs_of(model, inputs)
        leaves, kinds = tree_flatten(feed)
        told = tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else repr(t) for t in leaves)
        key = (_structure(model), str(kinds), told, dynamic, ways)
        if key not in _KNOWN:
            _KNOWN[key] = trace(model, inputs, dynamic=dynamic, ways=ways)
            while len(_KNOWN) > _MOST:
                _KNOWN.popitem(last=False)
        _KNOWN.move_to_end(key)
        # A program of its own, which knows this model and its inputs, and keeps its analyses.
        return replace(_KNOWN[key], feed=kept(model, feed))

    return remembered


def _changed(module: nn.Module) -> bool:
    """Whether a module's forward is more than what its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _structure(model: nn.Module) -> Hashable:
    """All that a graph depends on: what a trace is kept for, which tensors are one, and which are trained."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    state = ModelState.of(model)
    return (
        repr((state.tensors, state.modules, state.config)),
        tuple((first.setdefault(id(t), n), t.requires_grad) for n, t in tensors),
    )
