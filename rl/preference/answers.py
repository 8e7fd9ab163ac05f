"""Sampled answers to the questions of a manifest, judged by rewards, in a journal that a later start continues.

The journal is a folder with one file for each rank. A line has the answers to `CHUNK` neighbouring questions of the
manifest, which are drawn with a seed of their own: the answers depend neither on the number of processes nor on where
an earlier start was stopped. A line that a killed process left unfinished is computed again.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch.distributed as dist

from keye.errors import CheckpointError, KeyeError, writing
from keye.files import write_atomically
from keye.processor.processor import Sample
from rl.preference.phase import Answerer, progress_bar, release, say
from rl.questions.prompts import Prompt, PromptSet
from rl.rewards import Judgement, RewardSum, rewards_from
from rl.rollout.config import Rollout
from rl.rollout.engine import number_of
from rl.run.agree import agree, from_first, gather
from rl.run.identity import model_files
from stages.distributed.engine import resolve_precision
from stages.distributed.ranks import first_rank
from stages.distributed.weights import Start

CHUNK = 16  # questions of a journal's line
BLOCK = 1 << 16  # bytes that are searched together for the end of a line
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Answer:
    """A sampled answer: text, number of tokens, whether it ended, total reward, and accuracy (None: not judged)."""

    text: str
    tokens: int
    finished: bool
    reward: float
    accuracy: float | None


@dataclass(frozen=True)
class Answers:
    """The answers to one question; `error` says why it cannot be read."""

    where: str
    """`file:line` of the question."""

    answers: list[Answer]
    error: str = ""

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None for a question that has none or whose answers were not judged by accuracy."""
        values = [answer.accuracy for answer in self.answers if answer.accuracy is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Draw:
    """How answers are drawn: `samples` to each question at `temperature`, of `max_new_tokens` at most, with `seed`."""

    samples: int
    temperature: float
    max_new_tokens: int
    seed: int


class Journal:
    """The answers that were drawn so far.

    Args:
        folder: is created. settings: what the answers depend on; a folder with other settings is refused.

    Raises:
        CheckpointError: on all ranks, when the folder has the answers of other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        first_rank(lambda: self._open(json.loads(json.dumps(settings))), OSError)
        self.file = folder / f"answers-{dist.get_rank()}.jsonl"

    def _open(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        with writing(self.folder, "the answers", CheckpointError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, json.dumps(settings, indent=1) + "\n")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        for key in sorted(settings.keys() | found.keys()):
            if settings.get(key) != found.get(key):
                raise CheckpointError(
                    f"{self.folder} has answers that were drawn with {key} = {found.get(key)!r:.200}, but now it is "
                    f"{settings.get(key)!r:.200}; remove the folder, or give another one"
                )

    def add(self, chunk: int, rows: list[Answers]) -> None:
        """Append the answers to the questions of a chunk."""
        line = json.dumps({"chunk": chunk, "rows": [asdict(row) for row in rows]}, ensure_ascii=False) + "\n"
        with writing(self.file, "the answers", CheckpointError), self.file.open("ab+") as out:
            out.truncate(_end_of_lines(out))  # a killed process may have left a part of a line
            out.write(line.encode())

    def index(self) -> dict[int, tuple[Path, int]]:
        """Chunk → file and position of its line, over the files of all ranks."""
        found: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            with path.open("rb") as file:
                start = 0
                for line in file:
                    # The complete line is read in `rows`; here a broken one is found by its end alone.
                    if line.startswith(b'{"chunk": ') and line.endswith(b"]}\n"):
                        found[int(line[10 : line.index(b",")])] = (path, start)
                    start += len(line)
        return found

    def missing(self, questions: int) -> list[int]:
        """The chunks of `questions` questions that are not answered yet, the same on every rank; collective."""
        # Rank 0 reads the journal for all, because other ranks may see files of a network disk later.
        done = from_first(lambda: np.fromiter(self.index(), np.int64))
        return np.setdiff1d(np.arange(-(-questions // CHUNK)), done).tolist()

    def rows(self) -> Iterator[Answers]:
        """All answers in the order of the manifest."""
        for _, (path, start) in sorted(self.index().items()):
            with path.open("rb") as file:
                file.seek(start)
                for row in json.loads(file.readline())["rows"]:
                    yield Answers(row["where"], [Answer(**answer) for answer in row["answers"]], row["error"])


def _end_of_lines(file: BinaryIO) -> int:
    """The position behind the last complete line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def draw_answers(journal: Journal, prompts: list[Prompt], answerer: Answerer, reward: RewardSum, draw: Draw) -> None:
    """Answer all questions that the journal does not have yet; collective. Each rank takes its share of the chunks.

    Raises:
        KeyeError: on all ranks, when one cannot go on.
    """
    count, missing = -(-len(prompts) // CHUNK), journal.missing(len(prompts))
    rank, world = dist.get_rank(), dist.get_world_size()
    with progress_bar() as bar:
        task = bar.add_task("answers", total=count, completed=count - len(missing))

        def work() -> None:
            for chunk in missing[rank::world]:
                part = prompts[chunk * CHUNK : (chunk + 1) * CHUNK]
                answerer.generator.manual_seed(seed_of(draw.seed, chunk))
                journal.add(chunk, answer(part, answerer, reward, draw))
                bar.advance(task, world)

        agree(work)
    gather(None)  # all files are written


def seed_of(seed: int, chunk: int) -> int:
    """The seed of a chunk's answers, within the 64 bits that a generator takes."""
    return ((seed * 1_000_003 + chunk) * 4096 + 17) % (1 << 63)


def answer(prompts: list[Prompt], answerer: Answerer, reward: RewardSum, draw: Draw) -> list[Answers]:
    """`draw.samples` answers to each question, with their rewards; without those that a reward says not to count."""
    read: list[tuple[int, Sample]] = []
    rows: list[Answers] = [Answers(prompt.where, []) for prompt in prompts]
    for place, prompt in enumerate(prompts):
        try:
            read.append((place, answerer.encode(prompt)))
        except KeyeError as error:
            rows[place] = Answers(prompt.where, [], str(error))
    groups = answerer.rollout.generate([s for _, s in read], draw.samples, draw.temperature, draw.max_new_tokens)
    for (place, _), group in zip(read, groups, strict=True):
        answers = zip(group.texts, group.finished, group.completions, strict=True)
        asked = [Judgement(prompts[place], text, finished, len(tokens)) for text, finished, tokens in answers]
        judged = [(j, earned) for j, earned in zip(asked, reward.all(asked), strict=True) if earned.counts]
        found = [Answer(j.text, j.tokens, j.finished, e.total, e.parts.get("accuracy")) for j, e in judged]
        rows[place] = Answers(prompts[place].where, found)
    return rows


@dataclass(frozen=True)
class Sampled:
    """What is sampled, and by which rewards it is judged.

    found: the questions. families: that they were chosen by. limit: questions at most, see `questions`; 0 = all.
    rewards: name → weight. precision: of the model. batch: answers that are decoded together. rollout: how they are
    sampled.
    """

    found: PromptSet
    families: tuple[str, ...]
    limit: int
    rewards: dict[str, float | dict[str, Any]]
    precision: str
    batch: int
    rollout: Rollout = Rollout()

    @property
    def questions(self) -> list[Prompt]:
        """At most `limit` questions in their order, chosen by a hash of their ids.

        Manifests are often sorted, for example by family, so that their first lines are no sample of them.
        """
        prompts = self.found.prompts
        if not 0 < self.limit < len(prompts):
            return prompts
        places = heapq.nsmallest(self.limit, range(len(prompts)), key=lambda place: number_of(prompts[place].id))
        return [prompts[place] for place in sorted(places)]


def draw_all(folder: Path, start: Start, sampled: Sampled, draw: Draw) -> Journal:
    """The answers of the model `start` in the journal `folder`, those that are missing drawn now; collective.

    The encoder is the model's own, with the options of each message, as in training.

    Raises:
        CheckpointError: the journal has the answers of another model, or of other questions or settings.
    """
    settings = {
        "manifest": sampled.found.digest,
        "families": sampled.families,
        "limit": sampled.limit,
        "model": agree(lambda: model_files(start.directory)),
        "rewards": sampled.rewards,
        "precision": resolve_precision(sampled.precision),
        **({"chosen": "by a hash of the id"} if sampled.limit else {}),  # formerly the first ones
        **asdict(draw),
        **sampled.rollout.sampling,
    }
    journal, prompts = Journal(folder, settings), sampled.questions
    say(sampled.found.remarks)
    if journal.missing(len(prompts)):
        answerer = agree(lambda: Answerer(start, sampled.precision, sampled.batch, sampled.rollout))
        draw_answers(journal, prompts, answerer, agree(lambda: rewards_from(sampled.rewards, folder)), draw)
        del answerer
        release()
    return journal
