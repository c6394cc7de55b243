"""Pictures of a model: modules as nested frames, tensors as boxes, groups as colours."""

from shear_backends.draw.picture import draw, source

__all__ = ["draw", "source"]
