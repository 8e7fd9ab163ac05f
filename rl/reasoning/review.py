"""Step 4: the queue of trajectories that people check, their decisions, and the output that follows from both.

All trajectories of grade B and the borderline ones of grade A are in the queue. A decision is a line that is on disk
when the page shows the next trajectory; the last line of a trajectory counts. The output has the other trajectories of
grade A and the accepted ones, as they were edited.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, ManifestError, writing
from keye.files import atomic_file, write_atomically
from keye.processor.reply import Reply, write_reply
from rl.reasoning.items import Row, moved, unreviewed
from rl.reasoning.work import dropped_path, summary_path

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Decision:
    """accept: whether the trajectory is kept. steps: its chain, as edited."""

    accept: bool
    steps: tuple[str, ...]

    @classmethod
    def of(cls, given: Any) -> Decision:
        """A decision as the page sends it, checked.

        Raises:
            KeyeError: it is not in the format, or accepts a chain that cannot be used.
        """
        accept, steps = (given.get("accept"), given.get("steps")) if isinstance(given, dict) else (None, None)
        if not isinstance(accept, bool) or not isinstance(steps, list) or not all(isinstance(s, str) for s in steps):
            raise KeyeError("a decision needs accept, true or false, and steps, a list of texts")
        kept = tuple(text for step in steps if (text := " ".join(step.split())))
        if accept and not kept:
            raise KeyeError("an accepted chain needs a step; write one, or reject the chain")
        if accept and (found := next((tag for tag in TAGS for step in kept if tag in step), None)):
            raise KeyeError(f"a step contains {found}, which ends the thought; remove it")
        return cls(accept, kept)


class Review:
    """The queue of a graded file, with the decisions so far.

    Rows stay on disk; a place in the queue takes about 200 bytes of memory. Safe for threads.

    Args:
        source: the output of the step grade. out: the output of this step; decisions are in `<out>.decisions.jsonl`.

    Raises:
        ManifestError: the source is missing, has a line that is not of the step grade, or has no trajectory to review.
    """

    def __init__(self, source: Path, out: Path) -> None:
        self.source, self.out = source, out
        self.log = out.with_name(f"{out.stem}.decisions.jsonl")
        self.decisions: dict[str, Decision] = {}
        self._lock = threading.Lock()
        self._queue: list[tuple[str, int]] = []
        for place, row in self._rows():
            if unreviewed(row):
                self._queue.append((_key(row), place))
        self._known = {key for key, _ in self._queue}
        self._load()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def open(self) -> list[int]:
        """The places in the queue without a decision."""
        return [place for place, (key, _) in enumerate(self._queue) if key not in self.decisions]

    def row(self, place: int) -> Row:
        """The line of a place in the queue."""
        with self.source.open("rb") as file:
            file.seek(self._queue[place][1])
            return json.loads(file.readline())

    def decision(self, place: int) -> Decision | None:
        """The last decision on a place."""
        return self.decisions.get(self._queue[place][0])

    def decide(self, place: int, decision: Decision) -> None:
        """Record a decision; it is on disk when this returns."""
        key = self._queue[place][0]
        line = {"key": key, "accept": decision.accept, "steps": list(decision.steps), "time": round(time.time())}
        with self._lock, writing(self.log, "a decision"), self.log.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.decisions[key] = decision

    def write(self) -> dict[str, int]:
        """Write the output, the rejected lines and the summary; returns the counts."""
        counts: Counter[str] = Counter()
        with (
            writing(self.out, "the output"),
            atomic_file(self.out) as kept,
            atomic_file(dropped_path(self.out)) as left,
        ):
            with kept.open("w", encoding="utf-8") as lines, left.open("w", encoding="utf-8") as dropped:
                for _, row in self._rows():
                    key = _key(row)
                    result = self._reviewed(row, self.decisions.get(key)) if key in self._known else (row, "not queued")
                    row, what = result
                    row["messages"] = moved(row["messages"], self.source.parent, self.out.parent)
                    counts[what] += 1
                    if what != "open":
                        (dropped if what == "rejected" else lines).write(json.dumps(row, ensure_ascii=False) + "\n")
            summary = {"step": "review", "counts": dict(counts)}
            write_atomically(summary_path(self.out), json.dumps(summary, indent=1) + "\n")
        return dict(counts)

    def _reviewed(self, row: Row, decision: Decision | None) -> tuple[Row, str]:
        if decision is None:
            return row, "open"
        if not decision.accept:
            return row | {"reason": "rejected in the review"}, "rejected"
        path = row["trajectory"]
        before = [step["text"] for step in path["steps"]]
        known = {step["text"]: step["confidence"] for step in path["steps"]}
        thought = "\n".join(decision.steps)
        edited = before != list(decision.steps)
        path = path | {
            "steps": [{"text": step, "confidence": known.get(step)} for step in decision.steps],
            "thinking": thought,
            "text": write_reply(Reply(thought, path["answer"])) if edited else path["text"],
        }
        about = {"edited": edited, "characters": [sum(map(len, before)), sum(map(len, decision.steps))]}
        return row | {"trajectory": path, "reviewed": about}, "accepted, edited" if edited else "accepted"

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(offset, row) of each line of the source."""
        if not self.source.is_file():
            raise ManifestError(f"{self.source} does not exist; give the output of keye reasoning grade")
        with self.source.open("rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield place, _checked(line, f"{self.source}:{number}")
                place += len(line)

    def _load(self) -> None:
        """Read the decisions; a line that was cut off is removed, and those on other chains are ignored."""
        if not self.log.exists():
            return
        data = self.log.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.log, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                given = json.loads(line)
                self.decisions[given["key"]] = Decision.of(given)
            except (ValueError, KeyError, TypeError) as error:
                raise ManifestError(f"{self.log}:{number} is not a decision ({error}); delete that line") from error
        self.decisions = {key: decision for key, decision in self.decisions.items() if key in self._known}


def _key(row: Row) -> str:
    """Identifies a trajectory by its id and text, so that a decision is never applied to another chain."""
    return hashlib.sha256(f"{row['id']}\0{row['trajectory']['text']}".encode("utf-8", "replace")).hexdigest()[:32]


def _checked(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
        row["id"], row["grade"], row["messages"], row["answer"], row["trajectory"]["text"], row["trajectory"]["answer"]
        [(step["text"], step["confidence"]) for step in row["trajectory"]["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{where} is not a line of keye reasoning grade ({error!r:.80}); give its output"
        ) from error
    return row
