"""Data for whole runs, and one run that nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shear_tools.workflow import measure
from shear_tools.workflow.run import Outcome
from tests.traces import shared_traces
from tests.workflow.tiny import run, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and rounding follows the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def traced_for_all() -> Iterator[None]:
    """Fixtures of a module, too."""
    with shared_traces():
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Outcome:
    torch.manual_seed(0)
    return run(tmp_path_factory.mktemp("whole") / "out", data)


@pytest.fixture(scope="session", autouse=True)
def measured_once() -> Iterator[None]:
    """Speeds are measured, but not well."""
    before, measure.ROUNDS = measure.ROUNDS, 1
    yield
    measure.ROUNDS = before
