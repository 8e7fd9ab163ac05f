"""Ask a model every question of a benchmark and grade its replies."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

from keye.errors import KeyeError, VideoError
from keye.evaluation.benchmark import Benchmark, ManifestBenchmark, Question
from keye.evaluation.controls import CONTROLS, Control, apply, asked, partners
from keye.evaluation.match import match
from keye.evaluation.report import Baselines, Outcome, Report, merge

if TYPE_CHECKING:
    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor, Sample


def evaluate(
    model: "KeyeForConditionalGeneration",
    processor: "KeyeProcessor",
    benchmark: Benchmark | str | Path,
    families: Sequence[str] | None = None,
    limit: int | None = None,
    control: Control = "none",
    temperature: float = 0.0,
    train: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Report:
    """Ask `model` the questions of a benchmark and score its replies.

    Args:
        model: the model, on its device.
        processor: its processor.
        benchmark: a benchmark, or the path of a manifest.
        families: ask only these families (manifests only).
        limit: ask at most this many questions of each family (manifests only).
        control: "none", or what the model does not get (`keye.evaluation.controls.CONTROLS`); questions without the
            media that a control changes are skipped.
        temperature: 0 decodes greedily; otherwise replies are sampled.
        train: the training manifest that gives the majority answers (default: the benchmark itself).
        batch_size: questions per batch.
        max_new_tokens: a longer reply is cut off and counts as wrong.
        seed: seed of sampling; the caller's random state is restored.
        rank: of this process; it answers every `world_size`-th question. `merge` or `gather` joins the reports.
        world_size: number of processes.
        progress: show a bar.

    Returns:
        Every reply with its score. A clip that cannot be read is recorded and counts as wrong.

    Raises:
        ManifestError: the manifest is malformed or does not contain a family.
        KeyeError: a setting is out of range.
    """
    _check(control, limit, batch_size, max_new_tokens, temperature)
    began = time.monotonic()
    if isinstance(benchmark, str | Path):
        benchmark = ManifestBenchmark(benchmark, families, limit)
    questions = list(benchmark)
    baselines = Baselines(ManifestBenchmark(train) if train else questions)
    questions = [question for question in questions if asked(control, question)]
    others: Sequence[Question | None] = partners(questions) if control == "other" else [None] * len(questions)
    mine = list(enumerate(zip(questions, others, strict=True)))[rank::world_size]
    outcomes: list[Outcome] = []
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with Progress(disable=not progress) as bar, torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed + rank)
        task = bar.add_task(f"{benchmark.name}{'' if control == 'none' else f' ({control})'}", total=len(mine))
        for start in range(0, len(mine), batch_size):
            chunk = mine[start : start + batch_size]
            replies = _replies(model, processor, [pair for _, pair in chunk], control, temperature, max_new_tokens)
            for (index, (question, _)), (reply, error) in zip(chunk, replies, strict=True):
                outcomes.append(_grade(index, question, reply, error, baselines))
            bar.advance(task, len(chunk))
    model.train(was_training)
    settings = {"control": control, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    return Report(benchmark.name, outcomes, settings, time.monotonic() - began)


def _check(control: str, limit: int | None, batch_size: int, max_new_tokens: int, temperature: float) -> None:
    if control not in ("none", *CONTROLS):
        raise KeyeError(f"there is no control {control!r}; choose among none, {', '.join(CONTROLS)}")
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise KeyeError(f"{name} {value} is too small; give at least 1")
    if not 0 <= temperature < float("inf"):
        raise KeyeError(f"temperature {temperature} is not a number of 0 or more; give 0 for greedy replies")


def _grade(index: int, question: Question, reply: "Reply", error: str | None, baselines: Baselines) -> Outcome:
    right = match(reply.text, question.answer, question.tolerance, question.options, reply.finished)
    return Outcome(
        index=index,
        id=question.id,
        family=question.family,
        prediction=reply.text,
        answer=question.answer,
        correct=error is None and right,
        chance=baselines.chance(question),
        majority=baselines.majority(question),
        error=error,
        finished=reply.finished,
        slices=question.slices,
        group=question.group,
    )


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated reply.

    Attributes:
        text: without special tokens.
        finished: False if the token limit cut it off before its end token.
    """

    text: str
    finished: bool = True


def _replies(
    model: "KeyeForConditionalGeneration",
    processor: "KeyeProcessor",
    questions: Sequence[tuple[Question, Question | None]],
    control: Control,
    temperature: float,
    max_new_tokens: int,
) -> Iterator[tuple[Reply, str | None]]:
    """(reply, None) or (empty reply, error of the media) for each question, generated as one batch.

    questions: each with the one that lends its pixels, under the control "other".
    """
    samples: list[Sample] = []
    errors: list[str | None] = []
    for question, partner in questions:
        try:
            messages = question.blind() if control == "blind" else question.messages
            sample = processor.sample(messages, base_dir=question.base_dir, add_generation_prompt=True)
            source = partner and processor.sample(partner.messages, base_dir=partner.base_dir)
            samples.append(apply(control, sample, question, source))
            errors.append(None)
        except VideoError as error:
            errors.append(str(error))
    replies = iter(generate_replies(model, processor, samples, temperature, max_new_tokens) if samples else ())
    for error in errors:
        yield (Reply(""), error) if error else (next(replies), None)


def generate_replies(
    model: "KeyeForConditionalGeneration",
    processor: "KeyeProcessor",
    samples: "Sequence[Sample]",
    temperature: float = 0.0,
    max_new_tokens: int = 32,
) -> list[Reply]:
    """The model's reply to each prompt, generated as one left-padded batch."""
    batch = processor.collate(samples, padding_side="left")
    batch.pop("labels", None)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    tokenizer = processor.tokenizer
    ids = model.generate(
        **batch,
        **how,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = ids[:, batch["input_ids"].shape[1] :]
    ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    return [Reply(text, end) for text, end in zip(texts, ended, strict=True)]


def gather(report: Report) -> Report:
    """The complete report on every rank of the process group; `report` itself if there is no group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return report
    reports: list[Report] = [report] * distributed.get_world_size()
    distributed.all_gather_object(reports, report)
    return merge(reports)
