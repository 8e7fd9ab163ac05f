"""Measurements in separate processes, and the memory of a process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keye.errors import KeyeError
from scripts.bench.common.record import ROOT


def in_process(
    module: str, options: Sequence[str], what: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a module of the bench in a new process and return the JSON object of its last line of output.

    Raises:
        KeyeError: the process failed; the message names `what` and ends with the process's errors.
    """
    command = [sys.executable, "-m", module, *options]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables)
    if done.returncode:
        raise KeyeError(f"{what} failed: {done.stderr.strip()[-2000:] or 'no reason given'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def resident(field: str) -> int:
    """Bytes of this process in memory (Linux): now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
