"""Mistakes a user can mend: one sentence that names the file or key and says what to do, never a traceback."""

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class KeyeError(Exception):
    """A user's mistake; the message is one sentence with the file or key at fault and the mend."""


class ArgumentError(KeyeError, ValueError):
    """Arguments of a processor's call that make no sense; also what callers of transformers' processors catch."""


class VideoError(KeyeError):
    """A video or image that cannot be read."""


class RecipeError(KeyeError):
    """A recipe with an unknown key, a wrong type or an impossible value."""


class ManifestError(KeyeError):
    """A manifest line that is not a chat sample."""


class CheckpointError(KeyeError):
    """A model or checkpoint directory that is missing, torn or of another model."""


@contextmanager
def writing(path: str | os.PathLike, what: str = "the file", kind: type[KeyeError] = KeyeError) -> Iterator[None]:
    """Turn what the system says about a path that cannot be written to into one sentence."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error).splitlines()[0]
        raise kind(f"{what} cannot be written to {path} ({why}); give a path that you may write to") from error


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; a `KeyeError` becomes one line on stderr and exit code 2.

    What all processes of a launch run into is said by one of them.
    """
    try:
        sys.exit(main() or 0)
    except KeyeError as error:
        if first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if first_to_say("interrupted"):
            print("stopped: interrupted by the user; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def first_to_say(text: str) -> bool:
    """Whether no other process of this launch has said this sentence before; a process alone always is the first."""
    dist = sys.modules.get("torch.distributed")  # without it, nobody has joined others
    if dist is None or not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"said/{zlib.crc32(text.encode()):08x}", 1) == 1
    except RuntimeError:  # the store was the first rank's, which has gone: it has said what it had to say
        return dist.get_rank() == 0
