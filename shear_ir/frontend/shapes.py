"""Running a model on shapes alone, as ``torch.export`` does: no numbers, no weights, nothing of the model touched."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from shear_ir.frontend.feeds import with_tensors
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.unchanged import copied, unchanged


@contextlib.contextmanager
def on_shapes(
    model: nn.Module, feed: Inputs, env: ShapeEnv | None = None
) -> Iterator[tuple[Callable[[], nn.Module], Inputs, FakeTensorMode]]:
    """What makes a copy of ``model`` that holds shapes alone, ``feed`` as such, and the mode, to be run inside.

    ``env``: keeps what is asked of sizes that are symbols. Quiet: a run that fails is an answer.
    """
    silent = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
        # A hook of a copy may hold on to the model itself, and leave there what it saw.
        with unchanged(model), mode, _compiling_state_context(), torch.no_grad():
            own = (*model.parameters(), *model.buffers())
            memo: dict[int, Any] = {id(t): mode.from_tensor(t, static_shapes=True) for t in own}
            yield lambda: copied(model, memo), with_tensors(feed, mode.from_tensor), mode
    finally:
        logging.disable(silent)
