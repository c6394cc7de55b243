"""Selection: scores and a target become a Plan."""

from shear_passes.select.build import Selection, build_plan
from shear_passes.select.uniform import SelectUniform

__all__ = ["SelectUniform", "Selection", "build_plan"]
