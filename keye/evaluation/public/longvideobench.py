"""LongVideoBench (arXiv 2407.15754): 1,337 validation questions about videos of 8 seconds to an hour, with subtitles.

    DATA/lvb_val.json                  the annotation of the validation split
    DATA/videos/VIDEO.mp4
    DATA/subtitles/VIDEO_en.json

Prompt, frames and subtitles: README.md and longvideobench/longvideobench_dataset.py of
github.com/longvideobench/LongVideoBench; a subtitle follows the last frame before its middle, and is left out if no
sampled frame shows it. Answer rule: the task of lmms-eval, by the authors; a reply without a letter is a random choice.
"""

import random
import re
from collections.abc import Iterator, Sequence

from keye.errors import ManifestError
from keye.evaluation.public.question import (
    LETTERS,
    PublicBenchmark,
    PublicQuestion,
    Row,
    Subtitle,
    Verdict,
    read_json,
    user,
)

END = "Answer with the option's letter from the given choices directly."
DURATIONS = ("15", "60", "600", "3600")
LEADS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


class LongVideoBench(PublicBenchmark):
    """The validation split of LongVideoBench; its families are the four groups of duration, in seconds."""

    name = "longvideobench"
    max_new_tokens = 32
    num_frames = 64
    has_subtitles = True
    remedy = "join and extract the tar files of the Hub's longvideobench/LongVideoBench into videos/ and subtitles/"

    def families(self) -> Sequence[str]:
        return DURATIONS

    def read(self, families: Sequence[str]) -> Iterator[PublicQuestion]:
        path = self.data / "lvb_val.json"
        for number, values in enumerate(read_json(path, list, self.remedy), 1):
            row = Row(values, f"{path}, question {number}", self.remedy)
            options = row.texts("candidates")
            group = str(row("duration_group", (int, float, str)))
            lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
            seconds = float(row("duration", (int, float)))
            clip = self.data / "videos" / row("video_path")
            yield PublicQuestion(
                id=row("id"),
                family=group,
                messages=user(clip, "\n".join([f"Question: {row('question')}", *lines, END])),
                answer=LETTERS[row("correct_choice", int, range(len(options)).__contains__)],
                options=options,
                clip=clip,
                subtitles=self._subtitles(row, seconds) if self.subtitles else (),
                slices={
                    "duration group": group,
                    "question category": row("question_category"),
                    "topic": row("topic_category"),
                },
                seconds=seconds,
            )

    def judge(self, question: PublicQuestion, reply: str) -> Verdict:
        text = reply.strip()
        for lead in LEADS:
            text = text.replace(lead, "")
        found = re.search(r"[ABCDE]", text)
        # The authors draw a choice as well; the question's id as the seed makes it reproducible.
        drawn = random.Random(question.id).choice(LETTERS[: len(question.options)])
        return Verdict(found[0] if found else "", (found[0] if found else drawn) == question.answer)

    def frames(self, question: PublicQuestion, total: int, rate: float, count: int) -> list[int]:
        usable = int(question.seconds * rate)
        count = max(1, min(count, int(question.seconds)))
        return [min(int(usable / count) * place, total - 1) for place in range(count)]

    def _subtitles(self, row: Row, seconds: float) -> tuple[Subtitle, ...]:
        path = self.data / "subtitles" / row("subtitle_path")
        begin = float(row("starting_timestamp_for_subtitles", (int, float)))
        rows = enumerate(read_json(path, list, self.remedy), 1)
        return tuple(
            _subtitle(Row(values, f"{path}, line {number}", self.remedy), begin, seconds) for number, values in rows
        )


def _subtitle(row: Row, begin: float, seconds: float) -> Subtitle:
    """A line of one of the two forms: {"timestamp": [start, end], "text"} or {"start", "end", "line"}."""
    if "timestamp" in row.values:
        start, end = row("timestamp", list, lambda times: len(times) == 2 and isinstance(times[0], int | float))
        # The authors use the length of the clip for an end that is not a float, as if the clip began at second 0.
        start, end, text = float(start), end if isinstance(end, float) else begin + seconds, row("text")
    else:
        start, end, text = _seconds(row, "start"), _seconds(row, "end"), row("line")
    return Subtitle(start - begin, end - begin, text)


def _seconds(row: Row, key: str) -> float:
    try:
        hours, minutes, seconds = row(key).split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        raise ManifestError(
            f"{row.where}: {key} is {row(key)!r:.60}, not hours:minutes:seconds; {row.remedy}"
        ) from None
