"""What modules compute from their parameters in evaluation and keep, such as a table of position biases."""

from __future__ import annotations

from torch import Tensor, nn

_REGISTERED = ("_parameters", "_buffers", "_modules")


def forget_kept(model: nn.Module) -> None:
    """Let the modules of ``model`` drop what they keep outside of parameters and buffers, as they do to be trained.

    Read after the parameters have changed it would be stale, and in a trace it would be a constant. Modules that keep
    nothing are not touched: what their ``train`` does is their own.
    """
    keeping = [
        module
        for module in model.modules()
        if any(_is_kept(value) for name, value in vars(module).items() if name not in _REGISTERED)
    ]
    modes = {module: module.training for kept in keeping for module in kept.modules()}
    try:
        for module in keeping:
            module.train()
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_kept(value: object) -> bool:
    """Whether a plain attribute is a tensor, or a table of them."""
    inside = list(value.values()) if isinstance(value, dict) else [value]
    return bool(inside) and all(isinstance(each, Tensor) and not isinstance(each, nn.Parameter) for each in inside)
