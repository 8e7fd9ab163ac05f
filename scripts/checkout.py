"""Runs a command of `keye` from this checkout, installed or not."""

import importlib
import sys
from pathlib import Path


def run_command(module: str) -> None:
    """Call `main` of `module`, which is imported from the checkout, and exit with its code.

    Raises:
        SystemExit: always; the code is 2 where a dependency of the project is not installed.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.argv[0] = f"keye {module.rpartition('.')[2]}"  # the name in the usage, as keye.cli sets it
    from keye.errors import run

    run(lambda: importlib.import_module(module).main(), "pip install -e '.[{}]'")
