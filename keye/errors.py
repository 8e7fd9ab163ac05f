"""Errors that a user can correct: one sentence that names the file or key and says what to do, without a traceback."""

import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class KeyeError(Exception):
    """A user's mistake. The message is one sentence: the file or key at fault, and how to correct it."""


class ArgumentError(KeyeError, ValueError):
    """Invalid arguments of a processor's call; a ValueError too, which callers of transformers' processors catch."""


class VideoError(KeyeError):
    """A video or image that cannot be read."""


class RecipeError(KeyeError):
    """A recipe with an unknown key, a wrong type or an impossible value."""


class ManifestError(KeyeError):
    """A manifest line that is not a chat sample."""


class CheckpointError(KeyeError):
    """A model or checkpoint directory that is missing, incomplete or of another model."""


class FormerNameWarning(FutureWarning):
    """A key or option by its former name. Commands print it as one line, without a place in the code."""


@contextmanager
def writing(path: str | os.PathLike, what: str = "the file", kind: type[KeyeError] = KeyeError) -> Iterator[None]:
    """Raise an OSError of the block, or one that safetensors wraps, as a `kind` that names `what` and `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise kind(f"{what} cannot be written to {path} ({why}); give a path that you may write to") from error


@contextmanager
def loading(name: str | os.PathLike) -> Iterator[None]:
    """Raise the errors of transformers and safetensors about the model directory `name` as a CheckpointError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} cannot be loaded ({reason}); give a directory that a stage or keye convert wrote"
        ) from error


_EXTRAS = dict.fromkeys(("torch", "av", "skimage", "numpy", "PIL", "matplotlib", "rich", "safetensors"), "")
_EXTRAS |= {"transformers": "model", "gguf": "gguf", "peft": "lora", "trl": "trl", "fastapi": "serve"}
_EXTRAS |= {"uvicorn": "serve", "pyarrow": "train", "openai": "reasoning", "math_verify": "rewards"}
_EXTRAS |= {"markdown_it": "rewards"}
_EXTRAS |= dict.fromkeys(("deepspeed", "datasets", "aiohttp", "accelerate", "tensorboard", "sentencepiece"), "train")
"""Module of a dependency → the extra of this package that brings it; "" for one that is always installed."""


def missing_package(error: ModuleNotFoundError, install: str = "pip install 'keye[{}]'") -> KeyeError | None:
    """What to tell a user about a module that is not installed; None if it is no dependency of this package.

    Args:
        install: the command that installs an extra.
    """
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS or "." in (error.name or ""):  # a submodule is missing from an installed package
        return None
    return KeyeError(f"{package} is not installed; run: {install.format(_EXTRAS[package] or 'train')}")


def run(main: Callable[[], int | None], install: str = "pip install 'keye[{}]'") -> None:
    """Call `main` and exit with its code; a `KeyeError` becomes one line on stderr and exit code 2.

    So does a dependency that is not installed, with the command `install` of its extra. An error that all processes of
    a launch raise is printed by one of them.
    """
    warnings.formatwarning = _format_warning
    try:
        try:
            sys.exit(main() or 0)
        except ModuleNotFoundError as error:
            missing = missing_package(error, install)
            if missing is None:
                raise
            raise missing from error
    except KeyeError as error:
        if _first_to_report(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if _first_to_report("interrupted"):
            print("stopped: interrupted by the user; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


_FORMAT = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """A warning's text on stderr."""
    return f"warning: {message}\n" if issubclass(category, FormerNameWarning) else _FORMAT(message, category, *place)


def _first_to_report(text: str) -> bool:
    """Whether this process is the first of its launch to report `text`; true for a process of its own."""
    dist = sys.modules.get("torch.distributed")  # not imported: the process has joined no group
    if dist is None or not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"reported/{zlib.crc32(text.encode()):08x}", 1) == 1
    except RuntimeError:  # the store was in rank 0, which has ended and therefore has reported
        return dist.get_rank() == 0
