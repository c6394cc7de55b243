"""Other weights for a while: each module computes with a change of its own parameters, which come back bit for bit.

Only one module's changed weights exist at a time, so that trying a change costs no copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from shear_ir.errors import PlanError
from shear_ir.program import Program

TensorChange = Callable[[str, Tensor], Tensor]
"""From a parameter's name in the program and its values to other values of the same shape."""


class Substitution:
    """Forward passes of ``model`` with its parameters ``names`` changed."""

    def __init__(self, model: nn.Module, program: Program, names: tuple[str, ...]) -> None:
        wanted = {alias: name for name in names for alias in (name, *program.params[name].aliases)}
        self.owned: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self.unused = set(names)
        for path, module in model.named_modules():
            for leaf, tensor in module.named_parameters(recurse=False):
                name = wanted.get(f"{path}.{leaf}" if path else leaf)
                if name is not None and tensor.is_meta:
                    raise PlanError(f"{name} is offloaded, so it cannot be varied: place the model without offloading")
                if name is not None:
                    self.owned.setdefault(module, {})[name] = tensor

    @contextmanager
    def using(self, change: TensorChange) -> Iterator[None]:
        """Every module that runs in here sees its parameters changed."""
        with ExitStack() as hooks:
            for module, owned in self.owned.items():
                saved: dict[str, Tensor] = {}
                before, after = self._hooks(owned, saved, change)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
            yield

    def require_used(self) -> None:
        """Raise ``PlanError`` for a parameter whose own module never ran: its change was never seen."""
        if self.unused:
            raise PlanError(f"{min(self.unused)} is read by no call of its own module, so it cannot be varied there")

    def _hooks(
        self, owned: Mapping[str, nn.Parameter], saved: dict[str, Tensor], change: TensorChange
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any) -> None:
            for name, tensor in owned.items():
                saved[name] = tensor.data
                tensor.data = change(name, tensor.data)
            self.unused -= owned.keys()

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for name, tensor in owned.items():
                if name in saved:
                    tensor.data = saved.pop(name)

        return before, after
