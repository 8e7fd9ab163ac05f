"""Who answers the questions of a study: an ideal observer, and trained models."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keye.encoded import EncodedVideo, encode_patches
from keye.errors import KeyeError
from keye.evaluation.benchmark import Question
from keye.evaluation.match import match
from keye.slowfast.pixels import PixelFormat
from keye.slowfast.plan import VideoPlan
from keye.world.slowfastbench import Item

if TYPE_CHECKING:
    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor

OBSERVER = "observer"


@dataclass(frozen=True)
class Answerer:
    """A trained model of a study.

    Attributes:
        name: what it is called in tables; models of one name are seeds of one training.
        seed: its number among those of the same name.
        directory: of the model.
        policy: the only policy under which it answers, the one it was trained with; None for all.
    """

    name: str
    seed: int
    directory: str
    policy: str | None = None

    @property
    def by(self) -> str:
        """Name and seed as one text."""
        return f"{self.name}#{self.seed}"

    def identity(self) -> list:
        """Path and sizes and times of the weights, to notice another model."""
        path = Path(self.directory)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise KeyeError(f"--model {self.directory} has no weights; give a directory that a stage wrote")
        return [str(path.absolute()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def models_of(texts: Sequence[str]) -> list[Answerer]:
    """The models of `--model`: DIR answers under all policies, POLICY=DIR under its policy only.

    All are called "model". A policy that is named several times has several seeds, and so have several directories
    without a policy.

    Raises:
        KeyeError: some are named with a policy and others without.
    """
    found: list[Answerer] = []
    for text in texts:
        policy, sign, directory = text.rpartition("=")
        seed = sum(other.policy == (policy or None) for other in found)
        found.append(Answerer("model", seed, directory if sign else text, policy or None))
    if len({one.policy is None for one in found}) > 1:
        raise KeyeError("--model has directories with and without a policy; write POLICY=DIR for all or for none")
    return found


def observe(item: Item, plan: VideoPlan, pictures: Sequence[torch.Tensor]) -> str:
    """The ideal observer's answer."""
    from keye.world.slowfastbench.reader import read

    return read(item, plan.timestamps.tolist(), pictures)


def observed(family: str) -> bool:
    """Whether the ideal observer answers questions of a family."""
    from keye.world.slowfastbench.reader import readable

    return readable(family)


@functools.lru_cache(maxsize=8)
def _load(directory: str) -> "tuple[KeyeForConditionalGeneration, KeyeProcessor]":
    from keye.inference.chat import load_model

    return load_model(directory, "cuda:0" if torch.cuda.is_available() else "cpu")


class _ClipBenchmark:
    """The questions of one clip, which is encoded."""

    def __init__(self, items: Sequence[Item], video: EncodedVideo) -> None:
        self.name, self._items, self._video = "study", items, video

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Question]:
        for item in self._items:
            content = [{"type": "video", "video": self._video}, {"type": "text", "text": item.question}]
            options = None if item.options is None else list(item.options)
            messages = [{"role": "user", "content": content}]
            yield Question(item.name, item.family, messages, item.answer, options, item.tolerance, group=item.group)


def ask(model: Answerer, items: Sequence[Item], plan: VideoPlan, pictures: Sequence[torch.Tensor]) -> list[str]:
    """A model's replies to the questions of a clip."""
    from keye.evaluation.evaluate import evaluate

    network, processor = _load(model.directory)
    values, grid = encode_patches(pictures, plan.frame_sizes, 28, PixelFormat())
    report = evaluate(network, processor, _ClipBenchmark(items, EncodedVideo(values, grid, plan)), batch_size=4)
    # A reply that the token limit cut off is wrong, whatever it says.
    return [outcome.prediction if outcome.finished else "" for outcome in report.outcomes]


def right(item: Item, answer: str) -> bool:
    """Whether an answer is correct."""
    return match(answer, item.answer, item.tolerance, None if item.options is None else list(item.options))


def chance(item: Item) -> float:
    """The probability that a guess is correct: one of the options, or one of the places of a box."""
    return 1 / (len(item.options) if item.options else len(item.film.states))


def summary(models: Sequence[Answerer]) -> Mapping[str, Any]:
    """Name, seed and policy → identity, for `study.json`."""
    return {f"{model.by} {model.policy or 'all policies'}": model.identity() for model in models}
