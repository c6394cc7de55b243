"""The interface of an importance criterion."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shear_ir.manager import Analysis
from shear_passes.analysis.find_groups import FindGroups, Group

Score = npt.NDArray[np.float64]
Scores = Mapping[Group, Score]
"""Group to the importance of its units, shape ``(size,)``; the least important unit goes first."""


class Importance(Analysis[Scores]):
    """Scores every unit of every group that could lose units, seeing every slice the unit owns."""

    requires = (FindGroups,)
