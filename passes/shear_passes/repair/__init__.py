"""Repair without training: rewrites of weights that bring back what a cut takes; none changes the program."""

from shear_passes.repair.base import Repair
from shear_passes.repair.bias import FlapBias
from shear_passes.repair.least_squares import LeastSquares

__all__ = ["FlapBias", "LeastSquares", "Repair"]
