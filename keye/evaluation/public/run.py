"""Ask a model the questions of a public benchmark, store its replies, and continue a stopped run."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.encoded import EncodedVideo
from keye.errors import KeyeError
from keye.evaluation.controls import Control, apply, partners
from keye.evaluation.evaluate import Reply, generate_replies
from keye.evaluation.public.frames import FrameChoice, encode, messages_of
from keye.evaluation.public.question import PublicBenchmark, PublicQuestion
from keye.evaluation.public.scores import Prediction, PredictionFile
from keye.evaluation.report import Baselines
from keye.processor.reply import parse_reply
from keye.slowfast.plan import VideoPlan

if TYPE_CHECKING:
    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor, Sample

LOG_SECONDS = 60
"""Time between two lines of progress where the output is not a terminal."""


@dataclass(frozen=True)
class Prepared:
    """A question as the model gets it: tokens and pixels with the reply's first words, or an error; frame counts."""

    question: PublicQuestion
    sample: "Sample | None" = None
    prefix: str = ""
    error: str | None = None
    slow: int = 0
    fast: int = 0
    tokens: int = 0


def evaluate_public(
    model: "KeyeForConditionalGeneration",
    processor: "KeyeProcessor",
    benchmark: PublicBenchmark,
    out: str | Path,
    choice: FrameChoice | None = None,
    control: Control = "none",
    batch_size: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    thinking: bool | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    identity: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """The predictions of a model; those that the folder `out` has are not made again.

    Args:
        model: the model, on its device.
        processor: its processor; its encoder makes the slow-fast plans.
        benchmark: the questions.
        out: folder for `predictions.jsonl`.
        choice: which frames of a clip are used.
        control: "none", or what the model does not get (`keye.evaluation.controls.CONTROLS`).
        batch_size: questions generated together.
        max_new_tokens: limit of a reply (default: the benchmark's).
        temperature: 0 decodes greedily; otherwise replies are sampled.
        thinking: True or False append `/think` or `/no_think` to each question; None lets the model decide.
        seed: seed of sampling; the caller's random state is restored.
        rank: of this process; it answers every `world_size`-th clip.
        world_size: number of processes.
        identity: further JSON values that must be the same to continue, such as the model's path.
        progress: show a bar with the remaining time, or a line a minute where the output is not a terminal.

    Returns:
        The predictions that the folder has, in the order of the benchmark.

    Raises:
        KeyeError: the folder has predictions of other settings, or a setting is impossible.
    """
    choice, limit = choice or FrameChoice(), max_new_tokens or benchmark.max_new_tokens
    if batch_size < 1 or limit < 1 or not 0 <= temperature < float("inf"):
        raise KeyeError(f"batch_size={batch_size}, max_new_tokens={limit}, temperature={temperature}; raise them")
    if choice.frames == "official" and not (choice.num_frames or benchmark.num_frames):
        raise KeyeError(f"the authors of {benchmark.name} prescribe no number of frames; give --num-frames")
    settings = {"benchmark": benchmark.name, "subtitles": benchmark.subtitles, **asdict(choice)}
    settings["control"] = control
    settings |= {"max_new_tokens": limit, "temperature": temperature, "thinking": thinking, "seed": seed}
    settings["encoder"] = processor.encoder
    file = PredictionFile(Path(out), {**settings, **(identity or {})}, rank)
    baselines = Baselines(benchmark)
    clips = {clip: number for number, clip in enumerate(dict.fromkeys(question.clip for question in benchmark))}
    mine = [one for one in benchmark if clips[one.clip] % world_size == rank and one.id not in file.done]
    mine.sort(key=lambda one: clips[one.clip])  # a clip is encoded once for all its questions
    chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    room = model.config.text_config.max_position_embeddings - limit
    preparer = Preparer(processor, benchmark, choice, control, room, thinking)
    was_training, devices = model.training, [model.device] if model.device.type == "cuda" else []
    model.eval()
    title = benchmark.name if control == "none" else f"{benchmark.name} ({control})"
    with (
        ThreadPoolExecutor(1, "keye-clips") as pool,  # reads the next clips while the model generates
        _progress(title, len(mine), progress) as advance,
        torch.random.fork_rng(devices),
        torch.no_grad(),
    ):
        torch.manual_seed(seed + rank)
        ahead = pool.submit(preparer, chunks[0]) if chunks else None
        for number in range(len(chunks)):
            prepared = ahead.result()
            ahead = pool.submit(preparer, chunks[number + 1]) if number + 1 < len(chunks) else None
            samples = [one.sample for one in prepared if one.sample is not None]
            replies = iter(generate_replies(model, processor, samples, temperature, limit) if samples else ())
            answered = [(one, None if one.sample is None else next(replies)) for one in prepared]
            file.add(_judged(benchmark, one, reply, baselines) for one, reply in answered)
            advance(len(prepared))
    model.train(was_training)
    if world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()  # every process has written its predictions
    return in_order(benchmark, file.read())


def in_order(benchmark: PublicBenchmark, predictions: Sequence[Prediction]) -> list[Prediction]:
    """The predictions of the benchmark's questions, in its order."""
    found = {one.id: one for one in predictions}
    return [found[question.id] for question in benchmark if question.id in found]


def _judged(benchmark: PublicBenchmark, prepared: Prepared, reply: Reply | None, baselines: Baselines) -> Prediction:
    question = prepared.question
    verdict = benchmark.judge(question, parse_reply(reply.text).answer if reply else "")
    return Prediction(
        id=question.id,
        clip=str(question.clip),
        reply=prepared.prefix + reply.text if reply else "",
        answer=question.answer,
        choice=verdict.choice if verdict and reply else "",
        correct=None if verdict is None else verdict.correct and reply is not None,
        chance=baselines.chance(question),
        majority=baselines.majority(question),
        slices=dict(question.slices),
        slow=prepared.slow,
        fast=prepared.fast,
        tokens=prepared.tokens,
        error=prepared.error,
    )


class Preparer:
    """Encodes the clips of questions, the same clip once.

    Args:
        processor: of the model.
        benchmark: of the questions.
        choice: which frames of a clip are used.
        control: of `evaluate_public`.
        room: most tokens of a prompt; the clip of a longer one gets a smaller budget.
        thinking: of `evaluate_public`. A thought comes before the words that a benchmark puts before the reply, so that
            these are left out.
    """

    def __init__(
        self,
        processor: "KeyeProcessor",
        benchmark: PublicBenchmark,
        choice: FrameChoice,
        control: Control,
        room: int,
        thinking: bool | None = None,
    ) -> None:
        self.processor, self.benchmark, self.choice, self.control = processor, benchmark, choice, control
        self.partners: dict[str, PublicQuestion] = {}
        if control == "other":
            self.partners = dict(zip((one.id for one in benchmark), partners(list(benchmark)), strict=True))
        self.room, self.thinking = room, thinking
        self._latest: tuple[Any, EncodedVideo] | None = None

    def __call__(self, questions: Sequence[PublicQuestion]) -> list[Prepared]:
        return [self._prepare(question) for question in questions]

    def _prepare(self, question: PublicQuestion) -> Prepared:
        try:
            if self.control == "blind":
                return Prepared(question, self._sample(question, None), self._prefix(question))
            video = self._video(question)
            sample = self._sample(question, video)
            while len(sample) > self.room:
                video = self._smaller(question, video, len(sample))
                sample = self._sample(question, video)
            sample = self._controlled(question, sample, video.plan)
        except KeyeError as error:
            return Prepared(question, error=str(error))
        slow, fast = video.plan.counts
        return Prepared(question, sample, self._prefix(question), None, slow, fast, video.plan.tokens)

    def _controlled(self, question: PublicQuestion, sample: "Sample", plan: VideoPlan) -> "Sample":
        """The sample under the control; the parts of a clip between subtitles count as one video."""
        source = None
        if self.control == "other":
            partner = self.partners[question.id]
            lent = encode(partner, self.benchmark, self.processor._encoder, self.choice)
            source = self.processor.sample(messages_of(replace(partner, subtitles=()), lent))
        return apply(self.control, replace(sample, plans=[plan]), question, source)

    def _prefix(self, question: PublicQuestion) -> str:
        return "" if self.thinking else question.prefix

    def _video(self, question: PublicQuestion) -> EncodedVideo:
        key = (question.clip, tuple(sorted(question.sampling.items())))
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # one clip in memory is enough
            self._latest = (key, encode(question, self.benchmark, self.processor._encoder, self.choice))
        return self._latest[1]

    def _smaller(self, question: PublicQuestion, video: EncodedVideo, length: int) -> EncodedVideo:
        """The clip with fewer tokens, for a prompt of `length` tokens."""
        encoder = self.processor._encoder
        least, frames = encoder.min_tokens_per_frame, len(video.plan)
        budget = video.plan.tokens - (length - self.room)
        if frames == 1 and video.plan.tokens <= least:
            raise KeyeError(
                f"question {question.id} needs {length} tokens with one frame, and the model's context has room for"
                f" {self.room}; lower --max-new-tokens or leave out --subtitles"
            )
        changes = {"max_tokens": max(least, budget)}
        if not encoder.leaves_out:
            if budget < least * frames:  # fewer frames, each with the tokens of its time
                frames = max(1, frames * self.room // (2 * length))
            changes["max_frames"] = frames
        return encode(question, self.benchmark, encoder.with_settings(**changes), self.choice)

    def _sample(self, question: PublicQuestion, video: EncodedVideo | None) -> "Sample":
        messages, prefix = messages_of(question, video), self._prefix(question)
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        return self.processor.sample(
            messages, add_generation_prompt=not prefix, continue_final_message=bool(prefix), thinking=self.thinking
        )


@contextmanager
def _progress(title: str, total: int, show: bool) -> Iterator[Any]:
    """Yields a function that advances by a number of questions."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = logged = time.monotonic()
    count = 0
    show, console = show and total > 0, Console(stderr=True)
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not show) as bar:
        task = bar.add_task(title, total=total)

        def advance(step: int) -> None:
            nonlocal count, logged
            count += step
            bar.advance(task, step)
            now = time.monotonic()
            if show and not bar.console.is_terminal and now - logged > LOG_SECONDS and count < total:
                left = (now - began) / count * (total - count)
                print(f"{title}: {count} of {total} questions, {left:.0f} s left", file=sys.stderr, flush=True)
                logged = now

        yield advance
