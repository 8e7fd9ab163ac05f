"""`keye dream` from a checkout; see --help."""

from checkout import run_command

if __name__ == "__main__":
    run_command("stages.commands.dream")
