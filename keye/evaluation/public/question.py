"""Questions of public benchmarks, what an official script reads in a reply, and the files of a directory."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye.checks import suggestion
from keye.errors import KeyeError, ManifestError
from keye.evaluation.benchmark import Question

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Subtitle:
    """A subtitle that is displayed from `start` to `end`, in seconds of the clip."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Verdict:
    """What the official rule reads in a reply.

    Attributes:
        choice: the option, `A` or `yes`; "" if the rule reads none.
        correct: whether the official script counts the reply as correct.
    """

    choice: str
    correct: bool


@dataclass(frozen=True)
class PublicQuestion(Question):
    """A question of a public benchmark; `answer` is the letter of the correct option, or `yes` or `no`.

    Attributes:
        clip: the video file, or the folder of its frames.
        sampling: `start`, `end` and `source_fps` of the clip, as `open_clip` takes them.
        subtitles: those of the clip.
        heading: the line before the subtitles where they are listed before the prompt; "" puts them between the frames.
        prefix: first words of the reply, which the model continues.
        seconds: length of the clip by the annotation, None if it has none.
        official: values that the official rule needs.
    """

    clip: Path = Path()
    sampling: Mapping[str, float] = field(default_factory=dict)
    subtitles: tuple[Subtitle, ...] = ()
    heading: str = ""
    prefix: str = ""
    seconds: float | None = None
    official: Mapping[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text after the clip."""
        return self.messages[-1]["content"][-1]["text"]


class PublicBenchmark(ABC):
    """The questions of a public benchmark in its official directory.

    Attributes:
        name: of the benchmark.
        max_new_tokens: default limit of a reply.
        drops_unread: whether the official accuracy leaves out replies in which the rule reads no option.
        num_frames: number of frames that the authors prescribe, None if they leave it to the model.
        left_out: number of questions without a clip, with `skip_missing`.

    Args:
        data: the directory.
        families: keep only these families (default all).
        limit: keep the first questions of each family, at most this many (default all).
        subtitles: show the subtitles of the clip.
        skip_missing: leave out questions whose clip does not exist.

    Raises:
        KeyeError: the layout is incomplete, or an annotation is malformed; names file, key and remedy.
    """

    name: str
    max_new_tokens: int
    drops_unread = False
    num_frames: int | None = None
    has_subtitles = False
    remedy: str

    def __init__(
        self,
        data: str | Path,
        families: Sequence[str] | None = None,
        limit: int | None = None,
        subtitles: bool = False,
        skip_missing: bool = False,
    ) -> None:
        self.data, self.subtitles = Path(data), subtitles
        if not self.data.is_dir():
            raise KeyeError(f"{self.data} is not a directory; give the one of {self.name}: {self.remedy}")
        if subtitles and not self.has_subtitles:
            raise KeyeError(f"{self.name} has no subtitles; leave out --subtitles")
        known = self.families()
        for family in families or ():
            if family not in known:
                raise KeyeError(f"--families: {self.name} has no {family}; {suggestion(family, known)}")
        found = [question for question in self.read(families or known) if not families or question.family in families]
        missing = [question for question in found if not question.clip.exists()]
        if missing and not skip_missing:
            raise KeyeError(
                f"{len(missing)} of {len(found)} questions of {self.name} have no clip, such as {missing[0].id}:"
                f" {missing[0].clip} does not exist; {self.remedy}, or leave such questions out with --skip-missing"
            )
        self.left_out, taken = len(missing), dict.fromkeys(known, 0)
        self.questions: list[PublicQuestion] = []
        for question in found:
            if not question.clip.exists() or (limit is not None and taken.get(question.family, 0) >= limit):
                continue
            taken[question.family] = taken.get(question.family, 0) + 1
            self.questions.append(question)
        if not self.questions:
            raise KeyeError(f"{self.data} has no questions with clips; {self.remedy}")

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[PublicQuestion]:
        return iter(self.questions)

    @abstractmethod
    def families(self) -> Sequence[str]:
        """Names of the groups that can be chosen."""

    @abstractmethod
    def read(self, families: Sequence[str]) -> Iterator[PublicQuestion]:
        """The questions of these families, in the order of the annotation."""

    @abstractmethod
    def judge(self, question: PublicQuestion, reply: str) -> Verdict | None:
        """What the official script reads in a reply; None if it has no rule for it."""

    @abstractmethod
    def frames(self, question: PublicQuestion, total: int, rate: float, count: int) -> list[int]:
        """The frames that the authors sample, as indices in presentation order.

        Args:
            question: of the clip.
            total: number of frames of the clip.
            rate: frames per second.
            count: number of frames.
        """


def user(clip: Path, prompt: str, sampling: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """One turn: the clip, then the prompt."""
    video = {"type": "video", "video": str(clip), **(sampling or {})}
    return [{"role": "user", "content": [video, {"type": "text", "text": prompt}]}]


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """The value of a JSON file.

    Raises:
        ManifestError: the file is missing, is not JSON, or its value is not a `kind`.
    """
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; {remedy}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(value, kind):
        raise ManifestError(f"{path} has a {type(value).__name__}, not a {kind.__name__}; {remedy}")
    return value


class Row:
    """An annotation whose keys are checked when they are read.

    Args:
        values: the annotation.
        where: file and place in messages.
        remedy: what to do about a wrong one.
    """

    def __init__(self, values: Any, where: str, remedy: str) -> None:
        if not isinstance(values, Mapping):
            raise ManifestError(f"{where} is a {type(values).__name__}, not an object; {remedy}")
        self.values, self.where, self.remedy = values, where, remedy

    def __call__(
        self, key: str, kind: type | tuple[type, ...] = str, among: Callable[[Any], bool] | None = None
    ) -> Any:
        """The value of a key; ManifestError if it is missing or is not of this kind."""
        if key not in self.values:
            raise ManifestError(f"{self.where} has no key {key!r}; {self.remedy}")
        value = self.values[key]
        if not isinstance(value, kind) or isinstance(value, bool) or (among and not among(value)):
            raise ManifestError(f"{self.where}: {key} is {value!r:.60}; {self.remedy}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of two to ten strings."""

        def right(value: list) -> bool:
            return 2 <= len(value) <= len(LETTERS) and all(isinstance(text, str) for text in value)

        return self(key, list, right)
