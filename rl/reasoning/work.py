"""Runs a step over all questions: concurrent, in order, and resumable after the process was killed."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.errors import KeyeError, ManifestError, writing
from keye.files import atomic_file, write_atomically
from rl.endpoint import Client, EndpointError, RefusedRequest
from rl.reasoning.items import Item, Items, Row

CONSOLE = Console(stderr=True)


@dataclass
class Result:
    """What a step makes of one question: lines of the output, lines that are left out, and counts."""

    lines: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def summary_path(out: Path) -> Path:
    """The record of a step: settings, counts, cost."""
    return out.with_name(f"{out.stem}.summary.json")


def dropped_path(out: Path) -> Path:
    """The lines that a step left out, with the reason."""
    return out.with_name(f"{out.stem}.dropped.jsonl")


class Runner:
    """One step.

    The results are appended to `<out>.partial` in the order of the questions, so that a repeated command continues
    after the last complete one; answers that came later are in the cache. `<out>`, the dropped lines and the summary
    appear when all questions are done.

    Args:
        step: its name. source, out: JSONL files. settings: what the output depends on besides the source.
        client: closed when the step fails, so that no request is waited for.
        workers: questions at a time.
    """

    def __init__(
        self,
        step: str,
        source: Items,
        out: Path,
        settings: Row,
        client: Client,
        workers: int = 16,
    ) -> None:
        self.source, self.out, self.client, self.workers = source, out, client, workers
        header = {"step": step, "input": source.digest, "questions": len(source), "settings": settings}
        self.header: Row = json.loads(json.dumps(header))  # as it is read again
        self.partial = out.with_name(f"{out.name}.partial")

    def run(self, work: Callable[[Item], Result]) -> Row:
        """Call `work` for each question and write the outputs; returns the summary.

        A `KeyeError` of a question, such as an unreadable video or a refused request, drops that question.

        Raises:
            KeyeError: the outputs are of another command, or cannot be written.
            EndpointError: a model cannot be used, or the cost ceiling is reached; the same command continues.
        """
        finished = self._finished()
        if finished is not None:
            CONSOLE.print(f"{self.out} is complete; delete it to repeat the step")
            return finished
        started = time.monotonic()
        with writing(self.out, "the output"):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            done = self._resume()
            with self.partial.open("ab") as file:
                for result in self._results(work, done):
                    file.write(_line(vars(result)))
                    file.flush()
            return self._publish(time.monotonic() - started)

    def _finished(self) -> Row | None:
        """The summary of a complete output of the same command."""
        path = summary_path(self.out)
        if not path.exists() or not self.out.exists():
            if self.out.exists() and not self.partial.exists():  # with it, the process ended while it wrote the outputs
                raise ManifestError(f"{self.out} exists and was not written by this step; give another output")
            return None
        summary = json.loads(path.read_text(encoding="utf-8"))
        self._same(summary, self.out)
        return summary

    def _same(self, before: Row, path: Path) -> None:
        for key, now in self.header.items():
            if before.get(key) != now:
                old, new = before.get(key), now
                if key == "settings" and isinstance(old, dict):
                    key = next(k for k in {**old, **now} if old.get(k) != now.get(k))
                    old, new = old.get(key), now.get(key)
                raise ManifestError(
                    f"{path} was begun with {key} {old!r:.60}, not {new!r:.60}; delete it, or give another output"
                )

    def _resume(self) -> int:
        """The number of questions in the partial file, after a line that was cut off is removed from it."""
        if not self.partial.exists():
            self.partial.write_bytes(_line(self.header))
            return 0
        lines = end = 0
        with self.partial.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if lines == 0:
                    self._same(json.loads(line), self.partial)
                lines, end = lines + 1, end + len(line)
            file.truncate(end)
            if not lines:
                file.seek(0)
                file.write(_line(self.header))
        return max(0, lines - 1)

    def _results(self, work: Callable[[Item], Result], done: int) -> Iterator[Result]:
        """The results of the questions after the first `done`, in order."""
        waiting: deque[Future[Result]] = deque()
        columns = (
            TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="keye-reasoning")
        with Progress(*columns, console=CONSOLE) as bar:
            task = bar.add_task(self.header["step"], total=len(self.source), completed=done)
            try:
                for place, item in enumerate(self.source):
                    if place < done:
                        continue
                    waiting.append(pool.submit(_safe, work, item))
                    while len(waiting) >= 2 * self.workers:
                        yield waiting.popleft().result()
                        bar.advance(task)
                while waiting:
                    yield waiting.popleft().result()
                    bar.advance(task)
            except BaseException:
                self.client.close()  # ends the requests that the other workers wait for
                raise
            finally:
                pool.shutdown(cancel_futures=True)

    def _publish(self, seconds: float) -> Row:
        counts: Counter[str] = Counter()
        with atomic_file(self.out) as kept, atomic_file(dropped_path(self.out)) as left:
            with self.partial.open("rb") as file, kept.open("wb") as lines, left.open("wb") as dropped:
                next(file)
                for raw in file:
                    result = json.loads(raw)
                    counts.update(result["counts"])
                    lines.writelines(map(_line, result["lines"]))
                    dropped.writelines(map(_line, result["dropped"]))
        summary = self.header | {"counts": dict(counts), "rejected": self.source.rejected, "seconds": round(seconds, 1)}
        summary |= {"requests": usage(self.client)}
        write_atomically(summary_path(self.out), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        self.partial.unlink()
        return summary


def usage(client: Client) -> Row:
    """Requests, tokens and cost of this process; `spent` also counts earlier runs with the same cache."""
    ledger = client.ledger
    return {
        "new": ledger.calls,
        "cached": client.hits,
        "retries": client.retries,
        "lost": ledger.lost,
        "prompt_tokens": ledger.prompt_tokens,
        "completion_tokens": ledger.completion_tokens,
        "cost": round(ledger.cost, 6),
        "spent": round(client.cache.spent, 6),
    }


def _safe(work: Callable[[Item], Result], item: Item) -> Result:
    try:
        return work(item)
    except KeyeError as error:
        if isinstance(error, EndpointError) and not isinstance(error, RefusedRequest):
            raise
        row = {"id": item.prompt.id, "where": item.prompt.where, "reason": str(error)}
        return Result(dropped=[row], counts=Counter({"failed": 1}))


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
