"""Files that appear under their name only when they are complete."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path next to `path`; it replaces `path` after the block and is removed after an error.

    A reader, or a process that is killed in between, sees the previous content or the complete new one.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, completely or not at all; it is on disk when this returns.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # after a crash of the machine no file of zeros has the final name
