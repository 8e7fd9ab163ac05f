"""Mistakes a user can mend: one sentence that names the file or key and says what to do, never a traceback."""

import sys
from collections.abc import Callable


class KeyeError(Exception):
    """A user's mistake; the message is one sentence with the file or key at fault and the mend."""


class VideoError(KeyeError):
    """A video or image that cannot be read."""


class RecipeError(KeyeError):
    """A recipe with an unknown key, a wrong type or an impossible value."""


class ManifestError(KeyeError):
    """A manifest line that is not a chat sample."""


class CheckpointError(KeyeError):
    """A model or checkpoint directory that is missing, torn or of another model."""


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; a `KeyeError` becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main() or 0)
    except KeyeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: interrupted by the user; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
