"""Pictures of a model: modules as nested frames, tensors as boxes, groups as colours."""

from shear_backends.draw.picture import draw, source
from shear_backends.draw.proof import draw_explanation, explanation_source

__all__ = ["draw", "draw_explanation", "explanation_source", "source"]
