"""Rewrites: each returns a new Program."""

from shear_passes.rewrite.dead_code import DeadCode
from shear_passes.rewrite.drop_blocks import DropBlocks
from shear_passes.rewrite.raise_lora import RaiseLora
from shear_passes.rewrite.shear import Shear, cut_tensors, shear_program

__all__ = ["DeadCode", "DropBlocks", "RaiseLora", "Shear", "cut_tensors", "shear_program"]
