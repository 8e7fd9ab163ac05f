"""Measurements in separate processes, and the memory of a process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keye.errors import KeyeError
from scripts.bench.common.record import ROOT

# The line of an exception in a traceback or of a command's error; launchers put the rank before it.
_ERROR = re.compile(r"(?:\[rank\d+\]:\s*)?((?:error: |[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b).*)")


def in_process(
    module: str, options: Sequence[str], what: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a module of the bench in a new process and return the JSON object of the last line of output that has one.

    Raises:
        KeyeError: the process failed; the message names `what` and the error, and its output goes to stderr.
    """
    command = [sys.executable, "-m", module, *options]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables)
    if done.returncode:
        print(done.stderr.strip()[-20_000:], file=sys.stderr, flush=True)
        raise KeyeError(f"{what} failed: {reason_of(done.stderr, done.returncode)}")
    for line in reversed(done.stdout.splitlines()):  # libraries may write after it, when the process ends
        if line.startswith("{"):
            return json.loads(line)
    raise KeyeError(f"{what} failed: {module} printed no result")


def reason_of(errors: str, code: int) -> str:
    """The last exception among the errors that a process has written, or how it ended."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    found = [match[1] for line in lines if (match := _ERROR.match(line))]
    if found:
        return found[-1]
    ended = f"its process ended with code {code}"
    return f"{ended}: {lines[-1]}" if lines else ended


def resident(field: str) -> int:
    """Bytes of this process in memory (Linux): now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
