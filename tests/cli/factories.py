"""Models as ``tests.cli.factories:name``."""

from __future__ import annotations

import os
import signal
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.zoo import MLP, build


def mlp() -> nn.Module:
    """The gated MLP of the zoo."""
    return build("mlp")


def talkative() -> nn.Module:
    """The same; it prints while it is built."""
    print("building")
    return mlp()


def adapted() -> nn.Module:
    """The gated MLP with adapters on two of its layers."""
    return peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["gate", "down"]), mlp())


def other() -> nn.Module:
    """Another model."""
    return build("concat_and_split")


def nothing() -> int:
    """No model at all."""
    return 3


class _Stopped(MLP):
    by = signal.SIGTERM

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), self.by)
        return super().state_dict(*args, **kwargs)


class _HungUp(_Stopped):
    by = signal.SIGHUP


def hung_up() -> nn.Module:
    """An MLP whose terminal goes away while it is saved."""
    return _HungUp().eval()


def stopped() -> nn.Module:
    """An MLP that gets a SIGTERM while it is saved."""
    return _Stopped().eval()


class _Pair(nn.Module):
    """Takes two inputs, which no signature explains."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.down = nn.Linear(4, 12), nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.down((self.left(left) + self.right(right)).relu())  # type: ignore[no-any-return]


def pair() -> nn.Module:
    """Two inputs."""
    torch.manual_seed(0)
    return _Pair().eval()
