"""Manifests: JSON Lines in the chat format, one sample a line, media paths relative to the manifest."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keye.errors import ManifestError
from keye.files import atomic_file


def question_line(
    name: str,
    family: str,
    content: Sequence[dict[str, str]],
    answer: str,
    options: Sequence[str] | None,
    tolerance: float | None,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """The manifest line of a question and its answer.

    Args:
        name: the id.
        family: of the question.
        content: the parts of the user's turn.
        answer: the assistant's turn.
        options: the answers to choose from.
        tolerance: largest difference of a number that is correct.
        meta: what else is known of the question.
    """
    return {
        "id": name,
        "family": family,
        "messages": [
            {"role": "user", "content": list(content)},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "answer": answer,
        "options": None if options is None else list(options),
        "tolerance": tolerance,
        "meta": meta,
    }


def write_manifest(path: str | Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples in order, atomically. The same samples give the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part, part.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False, sort_keys=True) + "\n")


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Parse one manifest line; `ManifestError` begins with `where` (`file:line`) if the line is malformed."""
    try:
        sample = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); correct or delete that line (a manifest is "
            "JSON Lines (.jsonl), one sample a line)"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise ManifestError(f"{where} cannot be read as JSON ({error}); correct or delete that line") from error
    if "\\u" in line and _has_surrogate(sample):
        raise ManifestError(f"{where} contains a lone surrogate, which is not a character; correct or delete that line")
    messages = sample.get("messages") if isinstance(sample, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ManifestError(f'{where} has no messages; each line needs a list "messages" of chat turns')
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ManifestError(f'{where} has a message without "role" or "content"; give both')
    return sample


def _has_surrogate(value: Any) -> bool:
    """Whether a text in a value of JSON cannot be encoded, because its escapes are half of a pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def iter_manifest(path: str | Path) -> Iterator[dict[str, Any]]:
    """Iterate over the samples of a manifest without blank lines; `ManifestError` at the first malformed line."""
    path = Path(path)
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.jsonl"))), None)
        remedy = f"give a manifest in it, such as {inside}" if inside else "give a .jsonl manifest"
        raise ManifestError(f"{path} is a folder; {remedy}")
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; give a .jsonl manifest or make one with python -m keye.world")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ManifestError(f"{path}:{number} is not UTF-8 text; save the manifest as UTF-8") from error
            if line.strip():
                yield parse_line(line, f"{path}:{number}")


def read_manifest(path: str | Path) -> list[dict[str, Any]]:
    """All samples of a manifest; `ManifestError` names the file and the malformed line, or the empty file."""
    samples = list(iter_manifest(path))
    if not samples:
        raise ManifestError(f"{path} is empty; write samples into it with python -m keye.world")
    return samples
