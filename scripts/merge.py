"""`keye merge` from a checkout; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keye.errors import run  # noqa: E402
from stages.commands.merge import main  # noqa: E402

if __name__ == "__main__":
    run(main)
