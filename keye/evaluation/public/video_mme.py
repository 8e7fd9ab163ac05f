"""Video-MME (arXiv 2405.21075): 2,700 questions with four options about 900 videos of 11 seconds to an hour.

    DATA/videomme/test-*.parquet       the Hub's annotation, or one JSON file of the authors in DATA
    DATA/data/VIDEO.mp4                the videos, named by `videoID`
    DATA/subtitle/VIDEO.srt            subtitles of 744 videos

Prompt, subtitles and answer rule: README.md and evaluation/eval_your_results.py of github.com/BradyFU/Video-MME. The
authors leave the frames to the model; of the subtitles, only those that the sampled frames show are used.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import ManifestError, missing_package
from keye.evaluation.public.question import PublicBenchmark, PublicQuestion, Row, Subtitle, Verdict, read_json, user

INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter"
    " (A, B, C, or D) of the correct option."
)
END = "The best answer is:"
HEADING = "This video's subtitles are listed below:"
SUFFIXES = (".mp4", ".MP4", ".mkv")
DURATIONS = ("short", "medium", "long")
LEADS = ("The best answer is", "The correct answer is", "The answer is", "The answer")
"""What the script removes from a reply. Its list is longer, but a missing comma disables the other entries."""


class VideoMME(PublicBenchmark):
    """Video-MME; its families are the three categories of duration."""

    name = "video_mme"
    max_new_tokens = 16
    drops_unread = True
    has_subtitles = True
    remedy = "extract the zip files of the Hub's lmms-lab/Video-MME into data/ and subtitle/"

    def families(self) -> Sequence[str]:
        return DURATIONS

    def read(self, families: Sequence[str]) -> Iterator[PublicQuestion]:
        clips: dict[str, Path] = {}
        subtitles: dict[str, tuple[Subtitle, ...]] = {}
        for row in self._rows():
            video = row("videoID")
            if video not in clips:
                clips[video] = self._clip(video)
                subtitles[video] = self._subtitles(video) if self.subtitles else ()
            options = row.texts("options")
            prompt = "\n".join([INSTRUCTION, row("question"), *options, END])
            yield PublicQuestion(
                id=row("question_id"),
                family=row("duration", str, DURATIONS.__contains__),
                messages=user(clips[video], prompt),
                answer=row("answer", str, tuple("ABCD").__contains__),
                options=options,
                clip=clips[video],
                subtitles=subtitles[video],
                heading=HEADING,
                slices={
                    "duration": row("duration"),
                    "domain": row("domain"),
                    "sub-category": row("sub_category"),
                    "task": row("task_type"),
                },
            )

    def judge(self, question: PublicQuestion, reply: str) -> Verdict:
        text = reply.strip()
        for lead in LEADS:
            text = text.replace(lead, "")
        found = re.search(r"[ABCD]", text)
        choice = found[0] if found else ""
        return Verdict(choice, choice == question.answer)

    def frames(self, question: PublicQuestion, total: int, rate: float, count: int) -> list[int]:
        return np.linspace(0, total - 1, count, dtype=int).tolist()

    def _rows(self) -> Iterator[Row]:
        tables = sorted((self.data / "videomme").glob("test-*.parquet"))
        if tables:
            for table in tables:
                for number, values in enumerate(_parquet(table), 1):
                    yield Row(values, f"{table}, row {number}", self.remedy)
            return
        files = sorted(self.data.glob("*.json"))
        if len(files) != 1:
            found = f"{len(files)} JSON files" if files else "no JSON file"
            raise ManifestError(f"{self.data} has {found} and no videomme/test-*.parquet; {self.remedy}")
        for number, values in enumerate(read_json(files[0], list, self.remedy), 1):
            yield from _flat(Row(values, f"{files[0]}, video {number}", self.remedy))

    def _clip(self, video: str) -> Path:
        paths = [self.data / "data" / f"{video}{suffix}" for suffix in SUFFIXES]
        return next((path for path in paths if path.exists()), paths[0])

    def _subtitles(self, video: str) -> tuple[Subtitle, ...]:
        folder = self.data / "subtitle"
        if not folder.is_dir():
            raise ManifestError(f"{folder} does not exist; {self.remedy}")
        path = folder / f"{video}.srt"
        return tuple(read_srt(path)) if path.is_file() else ()


def read_srt(path: Path) -> Iterator[Subtitle]:
    """The subtitles of an SRT file, without markup.

    Raises:
        ManifestError: a block without `hours:minutes:seconds,milliseconds --> …`.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        times = next((place for place, line in enumerate(lines) if "-->" in line), None)
        if times is None:
            continue
        try:
            start, end = (_seconds(part) for part in lines[times].split("-->"))
        except ValueError:
            raise ManifestError(f"{path}: {lines[times]!r:.60} is not a time; extract the file again") from None
        words = re.sub(r"<[^>]+>", "", " ".join(lines[times + 1 :])).strip()
        if words:
            yield Subtitle(start, end, words)


def _seconds(text: str) -> float:
    hours, minutes, seconds = text.strip().split(" ")[0].replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read ({error}); download it again") from error


def _flat(video: Row) -> Iterator[Row]:
    """The questions of a video in the authors' JSON, each as a row of the Hub's table."""
    of = video.values
    name = of.get("videoID") or str(of.get("url", "")).rpartition("v=")[2] or video("video_id")
    shared = {
        "videoID": name,
        "duration": video("duration_category"),
        "domain": video("video_category"),
        "sub_category": of.get("video_sub_category") or of.get("video_subcategory"),
    }
    for number, values in enumerate(video("questions", list), 1):
        question = Row(values, f"{video.where}, question {number}", video.remedy)
        options = question.values.get("choices") or question.values.get("options")
        yield Row({**question.values, **shared, "options": options}, question.where, video.remedy)
