"""`keye encode` from a checkout; see --help."""

import sys

from checkout import run_command

if __name__ == "__main__":
    sys.argv.insert(1, "encode")
    run_command("keye.cli")
