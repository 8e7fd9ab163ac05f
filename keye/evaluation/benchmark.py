"""Benchmarks: named, ordered collections of questions with known answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from keye.errors import KeyeError, ManifestError
from keye.world.manifest import read_manifest


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        id: unique in the benchmark.
        family: group of questions that are scored together.
        messages: chat turns without the answer; media paths are relative to `base_dir`.
        answer: the correct answer.
        options: the texts to choose from, if there are any.
        tolerance: largest accepted distance of a number from the answer.
        base_dir: folder of the media.
        slices: slice → value, such as {"length": "16s"}, for tables by slice; from the key "slices" of "meta".
        group: questions with the same name depend on one another; from the key "group" of "meta".
    """

    id: str
    family: str
    messages: list[dict[str, Any]]
    answer: str
    options: list[str] | None = None
    tolerance: float | None = None
    base_dir: Path = Path(".")
    slices: dict[str, str] = field(default_factory=dict)
    group: str | None = None

    @property
    def media(self) -> list[str]:
        """ "image" or "video" for each part of the messages that is one."""
        return [part["type"] for part in self._media()]

    @property
    def files(self) -> list[Any]:
        """The images and videos of the messages."""
        return [part.get(part["type"]) for part in self._media()]

    def _media(self) -> list[dict[str, Any]]:
        contents = (message["content"] for message in self.messages)
        parts = (part for content in contents if not isinstance(content, str) for part in content)
        return [part for part in parts if part.get("type") in ("image", "video")]

    def blind(self) -> list[dict[str, Any]]:
        """The messages without their images and videos."""
        return [message | {"content": _words(message["content"])} for message in self.messages]


def _words(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [part for part in content if part.get("type") not in ("image", "video")]


class Benchmark(Protocol):
    """A named collection that yields its questions in the same order each time."""

    name: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Question]: ...


class ManifestBenchmark:
    """The questions of a JSONL manifest. The answer is `"answer"`, or else the last assistant turn.

    Args:
        path: the manifest.
        families: keep only these families (default all).
        limit: keep the first questions of each family, at most this many (default all).

    Raises:
        ManifestError: the file is missing, a line is malformed, or a family is unknown.
        KeyeError: `limit` is less than 1.
    """

    def __init__(self, path: str | Path, families: Sequence[str] | None = None, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise KeyeError(f"limit {limit} is too small; give at least 1")
        self.path = Path(path)
        self.name = self.path.stem
        self.questions: list[Question] = []
        samples = read_manifest(self.path)
        known = dict.fromkeys(str(sample.get("family", "all")) for sample in samples)
        for family in families or ():
            if family not in known:
                raise ManifestError(f"{path} has no family {family!r}; it has {', '.join(known)}")
        taken = dict.fromkeys(known, 0)
        for number, sample in enumerate(samples, 1):
            family = str(sample.get("family", "all"))
            if (families and family not in families) or (limit is not None and taken[family] >= limit):
                continue
            taken[family] += 1
            self.questions.append(self._question(sample, family, number))

    def _question(self, sample: dict[str, Any], family: str, number: int) -> Question:
        messages = list(sample["messages"])
        answer = sample.get("answer")
        if messages[-1]["role"] == "assistant":
            content = messages.pop()["content"]
            if answer is None:
                answer = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if answer is None or not messages:
            raise ManifestError(f"{self.path}: sample {number} has no question or no answer; give both or delete it")
        meta = sample["meta"] if isinstance(sample.get("meta"), dict) else {}
        return Question(
            id=str(sample.get("id", number)),
            family=family,
            messages=messages,
            answer=str(answer),
            options=sample.get("options"),
            tolerance=sample.get("tolerance"),
            base_dir=self.path.parent,
            slices=dict(meta.get("slices") or {}),
            group=meta.get("group"),
        )

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)
