"""What every test may count on: golden text, fixed seeds, no network."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.golden"]

# Read once, when huggingface_hub is first imported: none of the imports above does that.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# An operator's first call may take a second: a deadline would blame the example. CI draws the same examples each time.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights and inputs are the same in every run and in any order of tests."""
    torch.manual_seed(0)
