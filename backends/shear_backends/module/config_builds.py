"""What a class of transformers builds from a config, on the meta device; each build is done once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]

# Plans and cuts of one model ask for the same builds again and again; one search asks for up to 96.
_KEPT = 384


def shapes_of(model: nn.Module) -> Shapes:
    """The shape of every parameter and buffer, by each of its names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def built_shapes(kind: type[nn.Module], config: Any) -> Shapes | None:
    """The shapes of a ``kind`` built from ``config``, which is used up; None when the class refuses it."""
    return _shapes(_Build.of(kind, config))


def asked_for(kind: type[nn.Module], config: Any) -> list[str]:
    """Names the constructor looks up in ``config``, which is used up, although the config does not have them."""
    return _asked_for(_Build.of(kind, config))


@dataclass(frozen=True)
class _Build:
    """``told``: all that the constructor may read of the config, as text."""

    kind: type[nn.Module]
    told: object
    config: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, kind: type[nn.Module], config: Any) -> _Build:
        told = f"{type(config)}{sorted(vars(config).items(), key=lambda item: item[0])}"
        # An address says nothing: another object may have it next time.
        return cls(kind, object() if " at 0x" in told else told, config)


@lru_cache(_KEPT)
def _shapes(build: _Build) -> Shapes | None:
    # Here, because only a model of transformers has come this far.
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            return shapes_of(build.kind(build.config))
    except Exception:  # any constructor may refuse any config: then it is not this one
        return None


@lru_cache(_KEPT)
def _asked_for(build: _Build) -> list[str]:
    missed: list[str] = []
    config, kind = build.config, type(build.config)

    def note(_: Any, name: str) -> Any:
        missed.append(name)
        raise AttributeError(name)

    config.__class__ = type(kind.__name__, (kind,), {"__getattr__": note})
    try:
        with torch.device("meta"):
            build.kind(config)
    except Exception:  # a class may look at its config's type: then nothing is learned
        return []
    return [n for n in dict.fromkeys(missed) if not n.startswith("_")]
