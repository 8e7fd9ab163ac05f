"""Files that are derived from data once and kept next to the cache of `datasets`: indices and hashes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

import numpy as np

from keye.errors import ManifestError

T = TypeVar("T")
VERSION = 1  # of all these files; change it when their content or its meaning changes


def kept(what: str, mark: str, suffix: str, write: Callable[[str], None]) -> Path:
    """A file that `write` makes once per `mark`, next to the cache of `datasets`; other processes wait for it.

    Raises:
        ManifestError: it cannot be written.
    """
    import datasets
    from filelock import FileLock

    name = f"{what}-{datasets.fingerprint.Hasher.hash([what, mark, VERSION])}{suffix}"
    path = Path(datasets.config.HF_DATASETS_CACHE, "keye", name)
    try:
        if path.exists():  # without the lock: the cache may be read-only
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write(f"{path}.part")
                with open(f"{path}.part", "rb") as file:
                    os.fsync(file.fileno())  # after a crash of the machine no file of zeros has the final name
                os.replace(f"{path}.part", path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be written ({error}); free space, or set another HF_HOME") from None
    return path


def kept_array(what: str, mark: str, suffix: str, write: Callable[[str], None], read: Callable[[Path], T]) -> T:
    """What `read` returns of a file of `kept`; a damaged file is written again. ManifestError if that fails."""
    path = kept(what, mark, suffix, write)
    try:
        return read(path)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        logging.getLogger("stages").warning("%s: damaged (%s); it is written again", path, error)
    try:
        path.unlink(missing_ok=True)
        return read(kept(what, mark, suffix, write))
    except OSError as error:
        raise ManifestError(f"{path}: damaged, but cannot be removed ({error}); remove it") from None


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file."""
    with np.load(path) as saved:
        return dict(saved)
