"""Adds hints to the questions of a manifest: from the ground truth of SlowFastWorld, or written by a language model."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from keye.world.hints import world_hints
from keye.world.manifest import iter_manifest, write_manifest
from rl.alignment.text import count_word
from rl.endpoint import Answer, Ask, Client, RefusedRequest
from rl.hints import LEVELS
from rl.preference.selecting import moved

ATTEMPTS = 3
"""Answers of the model to a question until its line is written without hints."""
WAITING = 256
"""Questions that are sent before the first answer is needed; it bounds the memory."""

REQUEST = """Write five hints for a student who has to answer a question about a video, an image or a text.
Question: {question}{options}
Correct answer: {answer}

Hint 1 names the {0}. Hint 2 names the {1}. Hint 3 gives the {2}. Hint 4 gives the {3}. Hint 5 is the {4}, with the
correct answer. Hints 1 to 4 must not contain the correct answer. Answer with a JSON list of five strings only."""

Line = dict[str, Any]


def write_hints(
    manifest: Path, out: Path, client: Client | None = None, note: Callable[[int], None] = lambda number: None
) -> dict[str, int]:
    """Write the lines of `manifest` to `out`, with `hints` where they can be made, and count them.

    Lines that have hints keep them. Hints from ground truth make a line `trusted`; those of a language model do not,
    because it takes the answer of the manifest as correct.

    Args:
        client: the model that writes hints for other lines; it stores its answers, so that a repeated call continues.
        note: called after each line with the number of lines so far.

    Returns:
        Counts: lines, kept, world, written, without (no answer, or no hints could be made).

    Raises:
        ManifestError: the manifest is missing or malformed. EndpointError: the model gives no answers.
    """
    counts = Counter(lines=0, kept=0, world=0, written=0, without=0)

    def lines() -> Iterator[Line]:
        waiting: deque[tuple[Line, Future[Answer] | None]] = deque()
        for line in iter_manifest(manifest):
            line["messages"] = moved(line["messages"], manifest.parent, out.parent)
            waiting.append((line, _sent(line, client)))
            if len(waiting) >= WAITING:
                yield _finished(*waiting.popleft(), client, counts, note)
        while waiting:
            yield _finished(*waiting.popleft(), client, counts, note)

    write_manifest(out, lines())
    return dict(counts)


def _sent(line: Line, client: Client | None) -> Future[Answer] | None:
    """The request for a line's hints; None if it needs none."""
    if client is None or line.get("hints") or not line.get("answer") or world_hints(line):
        return None
    return client.submit(_ask(line, 0))


def _ask(line: Line, attempt: int) -> Ask:
    content = [message["content"] for message in line["messages"] if message["role"] == "user"][-1]
    parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    options = f"\nOptions: {'; '.join(line['options'])}" if line.get("options") else ""
    text = REQUEST.format(*LEVELS, question=" ".join(parts).strip(), options=options, answer=line["answer"])
    return Ask([{"role": "user", "content": text}], max_tokens=1024, temperature=0.7, sample=attempt)


def _finished(
    line: Line, sent: Future[Answer] | None, client: Client | None, counts: Counter[str], note: Callable[[int], None]
) -> Line:
    """A line with its hints, counted."""
    kind = "without"
    if line.get("hints"):
        kind = "kept"
    elif (found := world_hints(line)) is not None:
        kind, line = "world", {**line, "hints": found, "trusted": line.get("trusted", True)}
    elif sent is not None and (found := _written(line, sent, client)) is not None:
        kind, line = "written", {**line, "hints": found}
    counts[kind] += 1
    counts["lines"] += 1
    note(counts["lines"])
    return line


def _written(line: Line, sent: Future[Answer], client: Client) -> list[str] | None:
    """The model's hints for a line; None if no attempt gave valid ones."""
    for attempt in range(ATTEMPTS):
        try:
            answer = sent.result() if attempt == 0 else client.ask(_ask(line, attempt))
        except RefusedRequest:
            return None
        found = parse_hints(answer.text, line["answer"])
        if found is not None:
            return found
    return None


def parse_hints(text: str, answer: str) -> list[str] | None:
    """The five hints in a model's answer; None if there are none, or one before the last gives the answer away."""
    begin, end = text.rfind("["), text.rfind("]")
    begin = text.find("[") if begin > end else text.find("[", text.rfind("</think>") + 1)
    try:
        found = json.loads(text[begin : end + 1])
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or len(found) != len(LEVELS):
        return None
    if not all(isinstance(hint, str) and hint.strip() for hint in found):
        return None
    return None if any(count_word(hint, answer.strip()) for hint in found[:-1]) else [hint.strip() for hint in found]
