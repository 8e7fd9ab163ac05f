"""Rewards in a process of their own, which a time limit or a crash ends without ending the run.

`Workers` starts one process, which imports the rewards and forks a child for each batch of answers. The child sends one
result after another; when one is late, the child is killed and another one continues with the next answer. The
training process is never forked, because it has threads and a GPU.

Jobs are pickled (they come from the training process); results are JSON, because a child has read what a model wrote.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rl.rewards.base import Judgement, Outcome, Reward

_SERVE = "from rl.rewards.workers import serve; serve()"
MEMORY = 2 << 30  # bytes that a child may allocate beyond its libraries
START = 300.0  # seconds in which the process must have imported the rewards
CAUSE = 200  # characters of a cause


def outcome(reward: Callable[[Judgement], float], judgement: Judgement) -> Outcome:
    """Call a reward; an exception and a value that is not a finite number are failures with a cause."""
    try:
        value = reward(judgement)
        number = float(value)
    except (Exception, SystemExit) as error:
        return Outcome(None, f"{type(error).__name__}: {error}"[:CAUSE])
    if not math.isfinite(number):
        return Outcome(None, f"it gave {value!r:.80}, not a finite number")
    return Outcome(number)


def importable(reward: Reward) -> bool:
    """Whether another process finds the reward's class by its module and name."""
    cls = type(reward)
    module = sys.modules.get(cls.__module__)
    if module is None or cls.__module__ == "__main__" or getattr(module, "__spec__", None) is None:
        return False
    return getattr(module, cls.__qualname__, None) is cls


class Workers:
    """Runs rewards in a worker process, which is started at the first call.

    Args:
        rewards: by name; each must be picklable.
    """

    def __init__(self, rewards: dict[str, Reward]) -> None:
        self.rewards = rewards
        self._process: subprocess.Popen[bytes] | None = None
        self._results = b""

    def score(self, name: str, judgements: list[Judgement], seconds: float) -> list[Outcome]:
        """The outcomes of the reward `name`. seconds: time limit of each answer."""
        found: list[Outcome] = []
        try:
            process = self._started()
            pickle.dump((name, judgements, seconds), process.stdin)
            process.stdin.flush()
            for place in range(len(judgements)):
                found.append(self._result(process, seconds + (START if place == 0 else 60)))
        except (OSError, EOFError, ValueError, TypeError) as error:
            self.close()
            cause = f"the process of the rewards ended or does not answer ({type(error).__name__}: {error})"[:CAUSE]
            found += [Outcome(None, cause)] * (len(judgements) - len(found))
        return found

    def close(self) -> None:
        """End the process; the next call starts another one."""
        process, self._process, self._results = self._process, None, b""
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    __del__ = close

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-c", _SERVE]
            place = str(Path(__file__).resolve().parents[2])
            paths = [place, *filter(None, [os.environ.get("PYTHONPATH")])]
            # One thread: a second one would not exist in the children that the process forks.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            environment["CUDA_VISIBLE_DEVICES"] = ""
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
            pickled = {name: pickle.dumps(reward) for name, reward in self.rewards.items()}
            pickle.dump((sys.path, pickled), self._process.stdin)
        return self._process

    def _result(self, process: subprocess.Popen[bytes], seconds: float) -> Outcome:
        line, self._results = _read_line(process.stdout.fileno(), self._results, seconds)
        if line is None:
            raise TimeoutError(f"no result in {seconds:g} s")
        if not line:
            raise EOFError
        return Outcome(**json.loads(line))


def _read_line(source: int, pending: bytes, seconds: float) -> tuple[bytes | None, bytes]:
    """The next line of a file descriptor and what follows it; None after `seconds`, b"" at the end."""
    deadline = time.monotonic() + seconds
    while b"\n" not in pending:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([source], [], [], left)[0]:
            return None, pending
        more = os.read(source, 1 << 16)
        if not more:
            return b"", b""
        pending += more
    line, _, rest = pending.partition(b"\n")
    return line, rest


# --- the worker process -----------------------------------------------------------------------------------------------


def serve() -> None:
    """The worker process: jobs on the standard input, results on what was the standard output, until the input ends."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a reward prints is no result
    for number in (signal.SIGINT, signal.SIGTERM):  # the training process finishes its step after them
        signal.signal(number, signal.SIG_IGN)
    jobs = sys.stdin.buffer
    paths, pickled = pickle.load(jobs)
    sys.path[:] = paths
    rewards = {name: _load(data) for name, data in pickled.items()}
    while (job := _next_job(jobs)) is not None:
        name, judgements, seconds = job
        for found in _score(rewards[name], judgements, seconds):
            results.write(json.dumps({"value": found.value, "cause": found.cause}).encode() + b"\n")
            results.flush()


def _next_job(jobs: BinaryIO) -> tuple[str, list[Judgement], float] | None:
    try:
        return pickle.load(jobs)
    except EOFError:
        return None


def _load(data: bytes) -> Any:
    """A pickled reward, ready for its first answer; or the exception."""
    try:
        reward = pickle.loads(data)
        getattr(reward, "load", lambda: None)()
    except (Exception, SystemExit) as error:
        return error
    return reward


def _score(reward: Any, judgements: list[Judgement], seconds: float) -> Iterator[Outcome]:
    """The outcomes in order, from as many children as it takes."""
    if isinstance(reward, BaseException):
        cause = f"it cannot be loaded in its process ({type(reward).__name__}: {reward})"[:CAUSE]
        yield from [Outcome(None, cause)] * len(judgements)
        return
    place = 0
    while place < len(judgements):
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            _work(reward, judgements[place:], sink)
        os.close(sink)
        pending, ended = b"", False
        while place < len(judgements) and not ended:
            line, pending = _read_line(source, pending, seconds)
            ended = not line
            if line is None:
                yield Outcome(None, f"it took longer than {seconds:g} s")
            elif not line:
                yield Outcome(None, "its process crashed or ran out of memory")
            else:
                yield Outcome(**json.loads(line))
            place += 1
        os.close(source)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _work(reward: Reward, judgements: list[Judgement], sink: int) -> None:
    """A child's work; it does not return."""
    try:
        _limit_memory()
        getattr(reward, "confine", lambda: None)()
        for judgement in judgements:
            found = outcome(reward, judgement)
            os.write(sink, json.dumps({"value": found.value, "cause": found.cause}).encode() + b"\n")
    finally:
        os._exit(0)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no /proc on this system, or a lower limit already
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
