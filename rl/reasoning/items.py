"""The lines of the steps: questions in the chat format with an answer, and what earlier steps added to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.errors import ManifestError
from keye.processor.messages import KINDS
from keye.video.fetch import scheme_of
from rl.questions.prompts import Prompt, PromptSet, load_prompts

Row = dict[str, Any]

_SOURCES = (*KINDS, "url", "path")


@dataclass(frozen=True)
class Item:
    """A question and its complete line."""

    prompt: Prompt
    row: Row

    @property
    def question(self) -> str:
        """All text of the user's turns."""
        return question_of(self.prompt.messages)


def question_of(messages: list[Row]) -> str:
    """All text of the user's turns, without media."""
    texts = []
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            texts += [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    return "\n".join(text.strip() for text in texts)


def with_question(messages: list[Row], question: str) -> list[Row]:
    """The messages with `question` as the text of the last user's turn; its media and the other turns stay.

    Raises:
        ManifestError: there is no user's turn.
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise ManifestError("the chat has no message of a user; add one")
    content = messages[places[-1]]["content"]
    media = [] if isinstance(content, str) else [part for part in content if "text" not in part]
    changed = [*media, {"type": "text", "text": question}] if media else question
    return [{**m, "content": changed} if place == places[-1] else m for place, m in enumerate(messages)]


def media_of(messages: list[Row]) -> list[Row]:
    """The parts of the messages that are images or videos."""
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return [part for content in contents for part in content if "text" not in part]


def without_media(messages: list[Row]) -> list[Row]:
    """The messages without their images and videos."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part for part in message["content"] if "text" in part]}
        for message in messages
    ]


class Items:
    """The questions of a manifest, in order; rows are read while they are iterated.

    Attributes:
        rejected: `file:line` → reason, for the lines that cannot be used. digest: SHA-256 of the file.

    Raises:
        ManifestError: the file is missing, has no question with an answer, or two of them have one id.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path = Path(path)
        found: PromptSet = load_prompts(self.path, unique=True)
        self.prompts = found.prompts[:limit]
        self.rejected, self.digest = found.rejected, found.digest

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Item]:
        wanted = iter(self.prompts)
        prompt = next(wanted, None)
        with self.path.open("rb") as file:  # lines as `load_prompts` counts them
            for number, line in enumerate(file, 1):
                if prompt is None:
                    return
                if prompt.where == f"{self.path}:{number}":
                    yield Item(prompt, json.loads(line))
                    prompt = next(wanted, None)


def moved(messages: list[Row], source: Path, target: Path) -> list[Row]:
    """The messages with relative paths of their media, relative to `source`, relative to `target` instead."""
    if source.resolve() == target.resolve():
        return messages

    def path(value: Any) -> Any:
        if isinstance(value, str) and not scheme_of(value) and not os.path.isabs(value):
            return os.path.relpath((source / value).resolve(), target.resolve())
        if isinstance(value, list):
            return [path(part) for part in value]
        return part_of(value) if isinstance(value, Mapping) else value

    def part_of(part: Mapping[str, Any]) -> Row:
        return {name: path(value) if name in _SOURCES else value for name, value in part.items()}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part if "text" in part else part_of(part) for part in message["content"]]}
        for message in messages
    ]


def unreviewed(row: Row) -> bool:
    """Whether a graded trajectory still has to be reviewed: grade B, or a borderline A, without an accepted review."""
    return (row.get("grade") == "B" or bool(row.get("borderline"))) and "reviewed" not in row


def need(item: Item, key: str, step: str) -> Any:
    """The value that an earlier step wrote.

    Raises:
        ManifestError: it is missing.
    """
    if key not in item.row:
        raise ManifestError(
            f"{item.prompt.where} has no {key}: give the output of keye reasoning {step} to this command"
        )
    return item.row[key]
