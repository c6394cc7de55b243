"""The errors shear-ir raises, by audience: one small family, each message one clear sentence."""

from __future__ import annotations


class ShearError(Exception):
    """Base of every error a user can act on; the command line prints it and exits with code 2."""


class TraceError(ShearError):
    """The model could not be turned into a Program; names the module and the way out."""


class LoadError(ShearError):
    """A folder, file or name given as MODEL cannot be loaded."""


class PlanError(ShearError):
    """A plan cannot be made, read, or applied to this model."""


class OutOfReach(PlanError):
    """More is to go than can go."""


class TooLittle(PlanError):
    """Less is to go than the smallest step takes."""


class ShearingError(ShearError):
    """A plan is valid but this backend cannot express its result."""


class UnsoundError(ShearError):
    """A sheared model differs from the masked original; carries the measured difference in its message."""


class SaveError(ShearError):
    """An output folder cannot be written."""


class InvalidProgram(Exception):
    """A pass broke an invariant of the Program: a fault of shear-ir, never of its user."""


class CostWarning(UserWarning):
    """What was asked for is done, and the model has become larger by it; the message says by how much."""
