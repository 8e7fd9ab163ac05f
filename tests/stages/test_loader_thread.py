"""The loader's thread: credits, errors, state and its end."""

import os
import subprocess
import sys
import threading
import time

import pytest

from keye.errors import KeyeError
from stages.data.loader import Loader, encoding_threads
from stages.distributed.parallel import ParallelDims

ALONE = ParallelDims(0, 1, 1, None)


class Numbers:
    """A stream 0, 1, 2, …; fails at `bad` and counts its calls."""

    def __init__(self, bad: int = -1, seconds: float = 0.0) -> None:
        self.at, self.bad, self.seconds, self.closed = 0, bad, seconds, False

    def next(self) -> int:
        time.sleep(self.seconds)
        if self.at == self.bad:
            raise KeyeError("the reason")
        self.at += 1
        return self.at - 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        self.closed = True


def test_loader_raises_the_error_of_its_thread():
    loader = Loader(Numbers(bad=2), ALONE)
    assert [loader.next(), loader.next()] == [0, 1] and loader.state_dict() == {"at": 2}
    for _ in range(2):
        with pytest.raises(KeyeError, match="the reason"):
            loader.next()
    loader.close()


def test_closed_loader_has_no_thread():
    """A thread in the decoder at the end of the interpreter aborts the process."""
    before = set(threading.enumerate())
    loader = Loader(Numbers(seconds=0.3), ALONE)
    loader.next()
    assert set(threading.enumerate()) - before
    loader.close()
    assert not set(threading.enumerate()) - before and loader.stream.closed


def test_every_credit_is_used_if_other_ranks_wait_for_it():
    loader = Loader(Numbers(), ParallelDims(0, 2, 1, None), ahead=3)
    loader.next(), loader.next()
    loader.close()
    assert loader.stream.at == 5


def test_state_is_that_of_the_last_returned_batch():
    loader = Loader(Numbers(), ALONE, ahead=3)
    loader.next()
    state, second = loader.state_dict(), loader.next()
    loader.close()
    resumed = Loader(Numbers(), ALONE)
    resumed.load_state_dict(state)
    assert resumed.next() == second == 1
    resumed.close()


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(96, 8, 11), (224, 8, 16), (2, 1, 2), (2, 2, 2), (8, 1, 7)]
)
def test_encoding_threads_share_the_cores_among_the_processes_of_a_machine(cores, processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert encoding_threads(0) == threads and encoding_threads(3) == 3


LEFT_OPEN = """
import os, sys, torch
from types import SimpleNamespace
from stages.data.loader import Loader

for _ in range(3):
    if not (process := os.fork()):
        break
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        sys.exit(f"the program ends with code {code}")
else:
    sys.exit()

class Busy:
    def next(self):
        square = torch.ones(300, 300)
        for _ in range(60):
            square = (square @ square).clamp(0, 1)
        return 1
    state_dict = lambda self: {}
    close = lambda self: None

loader = Loader(Busy(), SimpleNamespace(world=2), ahead=50)
loader.next()
"""


def test_a_loader_left_open_ends_with_the_program():
    """Its thread is inside torch when the interpreter ends; it owes other ranks more batches.

    Each program is a fork of one that has imported all it needs and runs no Python thread.
    """
    # The allocator of pyarrow starts a thread, which a fork does not copy.
    environment = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    command = [sys.executable, "-c", LEFT_OPEN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
