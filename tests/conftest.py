"""What holds for every test."""

import gc
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("without a time limit", deadline=None)  # speed is measured in scripts/bench, not here
settings.load_profile("without a time limit")

THREADS = torch.get_num_threads()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `cuda` where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    """Exclude the million objects of the imported modules and tests from all later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unchanged_scheduling():
    """A test that leaves its process at real-time priority starves all processes that start later."""
    before = _policy()
    yield
    assert _policy() == before, "the test changes the scheduling policy of its process (see kept_scheduling)"


@pytest.fixture(autouse=True)
def unchanged_threads():
    """A command that runs in the process of a test takes all cores; the workers of xdist, which share them, then wait.

    Fixtures of a module run before this one, so the threads are also set before the test.
    """
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


def _policy() -> int | None:
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
