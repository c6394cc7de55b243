"""What modules compute from their parameters in evaluation and keep, such as a table of position biases."""

from __future__ import annotations

from torch import nn


def forget_kept(model: nn.Module) -> None:
    """Let the modules of ``model`` drop what they keep outside of parameters and buffers, as they do to be trained.

    Read after the parameters have changed it would be stale, and in a trace it would be a constant.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode
