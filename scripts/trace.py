"""`keye trace` from a checkout; see --help."""

from checkout import run_command

if __name__ == "__main__":
    run_command("keye.commands.trace")
