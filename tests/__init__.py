"""Tests mirror the sources; a package, so that `tests.golden` is ours whatever else is installed."""
