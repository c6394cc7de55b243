"""Traces for tests that are about something else: models of one structure share one, as their graphs are one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from shear_ir import pipeline
from shear_ir.program import Program

_KNOWN: dict[Hashable, Program] = {}
_PLAIN = (bool, int, float, str, tuple, list, type(None))


@contextmanager
def shared_traces() -> Iterator[None]:
    """Within it, a model is traced once, whatever its weights are; one that is fed, or hooked into, each time anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "_trace", _remembering(pipeline._trace))
        yield


def _remembering(trace: Callable[..., Program]) -> Callable[..., Program]:
    def remembered(model: nn.Module, inputs: Any = None, *, dynamic: bool = False, ways: bool = False) -> Program:
        if inputs is not None or any(map(_changed, model.modules())):
            return trace(model, inputs, dynamic=dynamic, ways=ways)
        key = (_structure(model), dynamic, ways)
        if key not in _KNOWN:
            _KNOWN[key] = trace(model, dynamic=dynamic, ways=ways)
        # A program of its own, which knows this model and keeps its analyses.
        return replace(_KNOWN[key])

    return remembered


def _changed(module: nn.Module) -> bool:
    """Whether a module's forward is more than what its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _structure(model: nn.Module) -> Hashable:
    """All that a graph depends on: classes, plain attributes, configs, and the kinds of tensors."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return (
        tuple((path, type(module), _attributes(module)) for path, module in model.named_modules()),
        tuple((n, first.setdefault(id(t), n), t.shape, t.dtype, t.device, t.requires_grad) for n, t in tensors),
        repr(vars(model).get("peft_config")),
    )


def _attributes(module: nn.Module) -> str:
    plain = {k: v for k, v in vars(module).items() if _is_plain(v) and k != "training"}
    return repr((plain, getattr(module, "config", None)))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, dict) and all(isinstance(v, _PLAIN) for v in value.values()))
