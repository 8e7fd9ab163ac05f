"""The tiny model of a demo, trained on with and without a motion pathway, at equal tokens and operations."""

import copy
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch

from keye import KeyeForConditionalGeneration, KeyeProcessor
from keye.evaluation.benchmark import ManifestBenchmark, Question
from keye.evaluation.evaluate import evaluate
from keye.files import write_atomically
from keye.model import flops
from keye.model.config import KeyeConfig
from keye.processor.sample import Sample
from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import Claim, Table
from stages.data.collate import pack

MOTION = {"size": 32, "width": 8, "blocks": [1, 1]}
ARMS = ("without", "with")
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 80, 8, 1e-3
TRAINED = {"motion": 240, "read": 80, "order": 80}  # clips of the demo's training split
ASKED = ("motion", "reversed", "read", "order")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
FPS = 2.0  # as the demo's encoder
MISSING = "The tiny model with a motion pathway: not measured."
NOTE = (
    f"The tiny model: {STEPS} steps of {BATCH} clips of the demo's training split, half of them about motion, with and "
    f"without the pathway {MOTION}. The arm without it gets as many more steps as the pathway adds operations, "
    "by keye.model.flops. Reversed clips are motion clips played backwards; of a pair both must be right. Intervals "
    "are paired over questions, of the mean over seeds."
)


@dataclass(frozen=True)
class Questions(Sequence[Question]):
    """A benchmark of questions in memory."""

    name: str
    questions: list[Question]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, place: int) -> Question:
        return self.questions[place]


def with_frames(question: Question) -> Question:
    """The question with the frames of its clip at `FPS`, uint8 `[T, H, W, 3]`, instead of a file."""
    content = [
        {**part, "video": _frames(question.base_dir / part["video"])} if part["type"] == "video" else part
        for part in question.messages[0]["content"]
    ]
    return replace(question, messages=[{**question.messages[0], "content": content}])


def _frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        step = round(float(stream.average_rate) / FPS)
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)][::step])


def reversed_clip(question: Question) -> Question:
    """The question about the clip played backwards, with the opposite answer: the other half of a minimal pair."""
    content = [
        {**part, "video": part["video"][::-1].copy()} if part["type"] == "video" else part
        for part in question.messages[0]["content"]
    ]
    return replace(
        question,
        id=f"{question.id}-reversed",
        family="reversed",
        messages=[{**question.messages[0], "content": content}],
        answer=OPPOSITE[question.answer],
    )


def held_out(run: Path, limit: int | None) -> Questions:
    """Questions of the demo's held-out clips, and those about motion also for the clips played backwards."""
    asked = [
        with_frames(q) for q in ManifestBenchmark(run / "world" / "heldout.jsonl", ["motion", "read", "order"], limit)
    ]
    return Questions("heldout", [*asked, *(reversed_clip(q) for q in asked if q.family == "motion")])


def training_samples(run: Path, processor: KeyeProcessor, counts: dict[str, int]) -> dict[str, list[Sample]]:
    """Samples of clips of the demo's training split; those about motion also backwards."""
    found: dict[str, list[Sample]] = {}
    for family, count in counts.items():
        questions = [with_frames(q) for q in ManifestBenchmark(run / "world" / "train.jsonl", [family], count)]
        if family == "motion":
            questions += [reversed_clip(q) for q in questions]
        answers = [{"role": "assistant", "content": q.answer} for q in questions]
        found[family] = [processor.sample([*q.messages, answer]) for q, answer in zip(questions, answers, strict=True)]
    return found


def steps_of(arm: str, samples: Sequence[Sample], config: KeyeConfig, steps: int) -> tuple[int, float]:
    """Steps of an arm, and the operations that the pathway adds, as a share: the arm without it gets more steps."""
    grids = torch.cat([s.video_grid_thw for s in samples])[:, 1:].tolist()
    lengths = [len(s) for s in samples]
    total = {
        motion is not None: flops.forward(_changed(config, motion), grids, lengths, rows=2 * len(samples)).total
        for motion in (None, MOTION)
    }
    share = total[True] / total[False] - 1
    return round(steps * (1 + share)) if arm == "without" else steps, share


def _changed(config: KeyeConfig, motion: dict | None) -> KeyeConfig:
    config = copy.deepcopy(config)
    config.vision_config.motion = motion
    return config


def train(
    folder: Path, arm: str, seed: int, samples: dict[str, list[Sample]], steps: int
) -> KeyeForConditionalGeneration:
    """The demo's model after some more steps: half of each batch is about motion, a quarter each about the others."""
    torch.manual_seed(seed)
    config = _changed(KeyeConfig.from_pretrained(folder), MOTION if arm == "with" else None)
    model = KeyeForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).train()
    model.set_attn_implementation("keye")
    total, _ = steps_of(arm, list(itertools.chain(*samples.values())), config, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    for step in range(total):
        rate = min(1.0, (step + 1) / (0.1 * total)) * 0.5 * (1 + math.cos(math.pi * step / total))
        optimizer.param_groups[0]["lr"] = RATE * rate
        batch = []
        for family, count in (("motion", BATCH // 2), ("read", BATCH // 4), ("order", BATCH // 4)):
            places = torch.randint(len(samples[family]), (count,), generator=draw).tolist()
            batch += [samples[family][place] for place in places]
        row = pack(batch)
        optimizer.zero_grad()
        model(**row, num_items_in_batch=float((row["shift_labels"] != -100).sum())).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def measure(run: Path, folder: Path, quick: bool) -> None:
    """Train and ask every arm and seed that `folder` does not have; "start" is the demo's model before, once."""
    steps, limit, seeds = (1, 2, SEEDS[:1]) if quick else (STEPS, None, SEEDS)
    counts = dict.fromkeys(TRAINED, 4) if quick else TRAINED
    left = [(arm, seed) for arm, seed in (("start", 0), *((a, s) for s in seeds for a in ARMS))
            if not _path(folder, arm, seed).exists()]  # fmt: skip
    if not left:
        return
    model_folder = run / "annealing" / "model"
    saved = KeyeProcessor.from_pretrained(model_folder)
    processor = KeyeProcessor(saved.tokenizer, encoder={**saved.encoder, "aggregation": "none"}, image=saved.image)
    asked, samples = held_out(run, limit), training_samples(run, processor, counts)
    for arm, seed in left:
        began = time.process_time()
        if arm == "start":
            model = KeyeForConditionalGeneration.from_pretrained(model_folder).eval()
        else:
            model = train(model_folder, arm, seed, samples, steps)
        share = steps_of("with", list(itertools.chain(*samples.values())), model.config, steps)[1]
        answers = answers_of(model, processor, asked)
        cpu = time.process_time() - began
        write_atomically(_path(folder, arm, seed), json.dumps({"answers": answers, "share": share, "cpu": cpu}) + "\n")
        means = ", ".join(f"{name} {100 * np.mean(values):.1f} %" for name, values in answers.items())
        print(f"  {arm}, seed {seed}: {means} ({cpu:.0f} s of CPU)", flush=True)


def finished(folder: Path) -> tuple[dict[str, list[dict[str, list[int]]]], float] | None:
    """Arm → seed → family → answers, of the seeds that `folder` has for both arms, and the CPU seconds of all.

    None if there is no such seed.
    """
    seeds = [seed for seed in SEEDS if all(_path(folder, arm, seed).exists() for arm in ARMS)]
    if not seeds or not _path(folder, "start", 0).exists():
        return None
    kept = {"start": [0], **dict.fromkeys(ARMS, seeds)}
    found = {arm: [json.loads(_path(folder, arm, seed).read_text()) for seed in own] for arm, own in kept.items()}
    answers = {arm: [one["answers"] for one in own] for arm, own in found.items()}
    return answers, sum(one["cpu"] for own in found.values() for one in own)


def added_operations(folder: Path) -> str:
    """A sentence about the operations that the pathway adds to a step."""
    share = json.loads(_path(folder, "start", 0).read_text())["share"]
    return f"The pathway adds {share:.1%} to the operations of the tiny model's step."


def _path(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"vlm_{arm}_{seed}.json"


def answers_of(model: KeyeForConditionalGeneration, processor: KeyeProcessor, asked: Questions) -> dict[str, list[int]]:
    """Family → 1 or 0 for each question; "pair" is 1 where a clip and its reversal are both right."""
    outcomes = evaluate(model, processor, asked, max_new_tokens=8).outcomes
    found = {family: [int(o.correct) for o in outcomes if o.family == family] for family in ASKED}
    found["pair"] = [a * b for a, b in zip(found["motion"], found["reversed"], strict=True)]
    return found


def report(found: dict[str, list[dict[str, list[int]]]]) -> tuple[list[Claim], Table]:
    """The claims and the table of the measurement."""
    families = (*ASKED, "pair")
    rows = [[arm, *(_share([seed[family] for seed in found[arm]]) for family in families)] for arm in ("start", *ARMS)]
    count = {family: len(found["with"][0][family]) for family in families}
    seeds = len(found["with"])
    table = Table(
        f"The demo's tiny model before and after more training with and without a motion pathway, correct in % "
        f"(lowest to highest of {seeds} seeds; number of questions)",
        ("model", *(f"{family} ({count[family]})" for family in families)),
        rows,
    )
    return list(_claims(found)), table


def _share(seeds: list[list[int]]) -> str:
    means = [100 * np.mean(values) for values in seeds]
    return f"{np.mean(means):.1f}" + (f" ({min(means):.1f}–{max(means):.1f})" if len(means) > 1 else "")


def _claims(found: dict[str, list[dict[str, list[int]]]]) -> Iterator[Claim]:
    for family in (*ASKED, "pair"):
        one, other = (np.mean([seed[family] for seed in found[arm]], axis=0) for arm in ("with", "without"))
        low, high = paired_interval(one - other)
        yield Claim(
            f"tiny model, {family}: with minus without the motion pathway",
            "–",
            f"{100 * (one - other).mean():+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]",
        )
