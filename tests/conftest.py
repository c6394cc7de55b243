"""What every test may count on: golden text, fixed seeds, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from tests.pretend_device import Pretend

pytest_plugins = ["tests.golden"]

# Read once, when huggingface_hub is first imported: none of the imports above does that.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# An operator's first call may take a second: a deadline would blame the example. CI draws the same examples each time.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("house")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``-n --dist loadgroup``: one worker has all tests of a family, or of a file, and traces its models once.

    The families come last: they are many small groups, which keep every worker busy to the end. Of those built alike,
    tests marked ``unlike`` take one; the others are ``thorough``.
    """
    from tests.zoo import UNLIKE

    for item in items:
        family = _family(item)
        if family is not None and family not in UNLIKE and item.get_closest_marker("unlike"):
            item.add_marker(pytest.mark.thorough)
        item.add_marker(pytest.mark.xdist_group(family or str(item.path)))
    items.sort(key=lambda item: _family(item) is not None)


def _family(item: pytest.Item) -> str | None:
    """The model of the zoo that a test is about, when it is a parameter of it."""
    from tests.zoo import FAMILIES  # not above: it imports huggingface_hub

    given = getattr(item, "callspec", None)
    return next((v for v in given.params.values() if isinstance(v, str) and v in FAMILIES), None) if given else None


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights and inputs are the same in every run and in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def pretend() -> Iterator[Pretend]:
    """Two accelerators that are as strict about devices as real ones; see ``tests/pretend_device.py``."""
    from tests.pretend_device import pretend_device  # not above: torch forgets no device

    with pretend_device() as made:
        yield made


_TRACED_ANEW = ("frontend", "oracle", "rules", "real")


@pytest.fixture(autouse=True)
def traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models of a library are traced once for all tests; those that are about tracing trace each anew."""
    anew = request.node.get_closest_marker("apart") or request.node.get_closest_marker("anew")
    if anew or set(_TRACED_ANEW) & set(request.path.parts):
        yield
        return
    from tests.traces import shared_traces  # not above, as with the zoo

    with shared_traces(modules=bool({"cli", "workflow"} & set(request.path.parts))):
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32, for tests that are marked ``real``."""
    return _fetched("smollm2")


@pytest.fixture(scope="session")
def smollm2_bf16() -> Path:
    """The same in bf16."""
    return _fetched("smollm2-bf16")


def _fetched(name: str) -> Path:
    from fetch_models import found

    folder = found(name)
    if folder is None:
        pytest.skip(f"{name} is not there: tools/fetch_models {name} makes it")
    return folder


@pytest.fixture(autouse=True)
def only_the_length_of_the_trace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are compared with the sheared program at one length, which is quicker; ``lengths`` marks the others."""
    if request.node.get_closest_marker("lengths") is None:
        for asked in ("_further", "_past_guards"):
            monkeypatch.setattr(f"shear_backends.module.judge.{asked}", lambda model, groups, feed: [])
        monkeypatch.setattr("shear_backends.verify.numbers.past_guards", lambda model, tried: ())
