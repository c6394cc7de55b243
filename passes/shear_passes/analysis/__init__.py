"""Analyses: what a Program's axes are, which of them can lose indices together, and what that saves."""
