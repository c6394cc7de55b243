"""A program that grows line by line: its text, and the values its lines have so far.

Every line runs when it is added, so that the next one knows the shapes; one that does not fit is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T = TypeVar("T")

SIZES = (2, 3, 4, 6, 8, 12)
LARGEST = 3000
NAMES = {"torch": torch, "nn": nn, "F": F, "math": math}


class Misfit(Exception):
    """A step that does not go with what is there; it is left out."""


class Choose:
    """Choices made one after the other by ``integer(low, high)``."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.int = integer

    def one(self, options: Sequence[T]) -> T:
        """One of the options, the first being the simplest."""
        if not options:
            raise Misfit
        return options[self.int(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        """True in so many cases of a hundred."""
        return self.int(0, 99) >= 100 - percent

    def size(self) -> int:
        """A number of channels."""
        return self.one(SIZES)


@dataclass(frozen=True)
class Sketch:
    """A finished program: lines of ``__init__`` and ``forward``, the shapes of its inputs, what it returns."""

    setup: tuple[str, ...]
    inputs: dict[str, tuple[int, ...]]
    lines: tuple[str, ...]
    returns: tuple[str, ...]

    @property
    def source(self) -> str:
        """The module as text that stands on its own."""
        body = "\n".join(f"        {line}" for line in ("super().__init__()", *self.setup))
        steps = "\n".join(f"        {line}" for line in (*self.lines, f"return {', '.join(self.returns)}"))
        return (
            "import math\n\nimport torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n\n"
            f"class Program(nn.Module):\n    def __init__(self):\n{body}\n\n"
            f"    def forward(self, {', '.join(self.inputs)}):\n{steps}\n"
        )

    def feed(self, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs."""
        generator = torch.Generator().manual_seed(seed)
        return {name: _input(name, shape, generator) for name, shape in self.inputs.items()}

    def build(self, seed: int = 0) -> nn.Module:
        """The module in evaluation mode with random tensors, none of them zero or one throughout."""
        space: dict[str, Any] = {}
        torch.manual_seed(seed)
        exec(compile(self.source, "<program>", "exec"), space)  # the text is our own
        model: nn.Module = space["Program"]()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if tensor.is_floating_point():
                    drawn = torch.randn(tensor.shape)
                    tensor.copy_(drawn.abs() + 0.5 if name.endswith("var") else drawn.sign() * (drawn.abs() + 0.05) / 2)
        return model.eval()


def _input(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.startswith("ids"):
        return torch.randint(0, 4, shape, generator=generator)
    return torch.randn(shape, generator=generator)


class Draft:
    """What a program has so far. ``values``: by name, in the order they were made; ``params``: shapes of raw ones."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.setup: list[str] = []
        self.lines: list[str] = []
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Tensor] = {}
        self.params: dict[str, tuple[int, ...]] = {}
        self.read: set[str] = set()
        self.ids: list[str] = []
        self._self = SimpleNamespace(training=False)
        self._given: set[int] = set()
        self._count = 0

    def input(self, name: str, *shape: int) -> None:
        """One more argument of ``forward``."""
        value = _input(name, shape, torch.Generator().manual_seed(0))
        self.inputs[name] = shape
        (self.ids.append(name) if name.startswith("ids") else None)
        self.values[name] = value
        self._given.add(value.untyped_storage().data_ptr())

    def attempt(self, step: Callable[[Draft, Choose], None]) -> bool:
        """Do a step, or take back what it did before it proved not to fit."""
        before = len(self.setup), len(self.lines), dict(self.values), dict(self.params), set(self.read)
        try:
            step(self, self.choose)
            return True
        except (Misfit, RuntimeError, IndexError, ValueError, TypeError, AssertionError, ZeroDivisionError):
            del self.setup[before[0] :], self.lines[before[1] :]
            self.values, self.params, self.read = before[2:]
            return False

    def own(self, prefix: str, made: str) -> str:
        """Add ``made`` to the constructor; its name in ``forward``."""
        name = f"{prefix}{self._next()}"
        self.setup.append(f"self.{name} = {made}")
        setattr(self._self, name, eval(made, dict(NAMES)))  # the text is our own
        return f"self.{name}"

    def param(self, *shape: int, share: int = 15) -> str:
        """A raw parameter: now and then one that is there already."""
        known = [name for name, other in self.params.items() if other == shape]
        if known and self.choose.chance(share):
            return self.choose.one(known)
        name = self.own("p", f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")
        self.params[name] = shape
        return name

    def expose(self, *shape: int) -> None:
        """A raw parameter that is a value like any other."""
        name = self.param(*shape)
        value = getattr(self._self, name.removeprefix("self."))
        self.values[name] = value
        self._given.add(value.untyped_storage().data_ptr())

    def module(self, made: str) -> str:
        """A layer: ``made`` is the call that makes it."""
        return self.own("m", made)

    def emit(self, text: str) -> str:
        """Add a line that makes one value; its name."""
        value = self._run(text)
        if not isinstance(value, Tensor):
            raise Misfit
        return self._keep(text, (value,), "")[0]

    def emit_many(self, text: str) -> tuple[str, ...]:
        """Add a line that makes several values; their names."""
        values = self._run(text)
        return self._keep(text, tuple(values), "," if len(values) == 1 else "")

    def write(self, name: str, text: str) -> None:
        """Add a line that writes to the memory of a value, which no input and no parameter may share."""
        if self.values[name].untyped_storage().data_ptr() in self._given:
            raise Misfit
        self._run(text)
        self._check(self.values[name])
        self.lines.append(text)

    def pick(self, fits: Callable[[Tensor], bool] = lambda value: True) -> str:
        """The name of a value that fits, the latest or any."""
        names = [n for n, v in self.values.items() if n not in self.ids and fits(v)]
        if not names:
            raise Misfit
        name = names[-1] if self.choose.chance(55) else self.choose.one(names[::-1])
        self.read.add(name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value."""
        return tuple(self.values[name].shape)

    def finish(self, returns: Sequence[str]) -> Sketch:
        """The program that returns these values."""
        return Sketch(tuple(self.setup), dict(self.inputs), tuple(self.lines), tuple(returns))

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _run(self, text: str) -> Any:
        with torch.no_grad():
            return eval(text, {**NAMES, "self": self._self, **self.values})  # the text is our own

    def _keep(self, text: str, values: tuple[Any, ...], comma: str) -> tuple[str, ...]:
        names = tuple(f"v{self._next()}" for _ in values)
        for value in values:
            self._check(value)
        self.lines.append(f"{', '.join(names)}{comma} = {text}")
        self.values.update(zip(names, values, strict=True))
        for value in values:
            if any(value.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in self._tensors()):
                self._given.add(value.untyped_storage().data_ptr())
        return names

    def _tensors(self) -> list[Tensor]:
        return [t for t in vars(self._self).values() if isinstance(t, Tensor)]

    def _check(self, value: Any) -> None:
        """Floats, few, finite and not large."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or not 0 < value.numel() <= LARGEST:
            raise Misfit
        if value.dim() > 6 or not bool(value.detach().isfinite().all()) or float(value.detach().abs().max()) > 1e3:
            raise Misfit
