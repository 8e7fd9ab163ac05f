"""The tiny reader of the study of feature aggregation: its drawn questions, its encoders and its training.

Questions are drawn in memory and never repeated. All clips last 6 s: 12 half seconds, 24 frames of 112 x 112 pixels,
which are 4 x 4 tokens at full size.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from keye.encoder import EncodedVideo, SlowFastEncoder
from keye.evaluation import Question, evaluate
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from keye.world import texts
from keye.world.draft import Draft
from keye.world.families import FAMILIES, deal
from keye.world.scene import CELL, Setting
from stages.data.collate import pack
from stages.optimizer import OptimizerConfig, build_optimizer

TRAIN, HELDOUT, STILLS = 0, 1, 2
READ = {"read": 0.2, "find": 0.0}
"""Families whose answer a single frame has, with their difficulty; the stills are frames of these."""
WATCHED = {**READ, "order": 0.2, "motion": 0.0}
"""Families of the trained readers."""
SIDE, SECONDS, CELLS, SLOW = 112, 6.0, 12, 3
MOST_STILLS = 6
TOKENS = 96
"""Visual tokens of a clip in the comparison of pathways."""

SIZES = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 512, "slow_multiple": 0.0, "fps": 2.0}


def two(fast: int = 4, aggregation: str | None = "mean") -> dict[str, Any]:
    """Three slow frames of 16 tokens, and `fast` tokens of each of 12 frames."""
    return {**SIZES, "policy": f"two_stream:slow={SLOW},fast_tokens={fast}", "aggregation": aggregation}


ENCODERS: dict[str, dict[str, Any]] = {
    "slow + fast": two(),
    "slow only": {**SIZES, "policy": "all_slow", "max_frames": TOKENS // 16, "min_tokens_per_frame": 16},
    "fast only": {
        **SIZES, "policy": "all_slow", "fps": 4.0, "max_tokens_per_frame": 4, "aggregation": "mean:oversample=2",
    },
    "slow + fast, pixels": two(aggregation=None),
    "slow + fast, maximum": two(aggregation="max"),
    "slow + fast, slow block first": two(aggregation="mean:layout=slow_then_fast"),
    "1 token a fast frame": two(1),
    "16 tokens a fast frame": two(16),
    "slow frames, no fast": {**SIZES, "policy": "all_slow", "max_frames": SLOW, "min_tokens_per_frame": 16},
}  # fmt: skip
"""Name → settings of the encoder. The first four have `TOKENS` tokens a clip."""


@dataclass(frozen=True)
class Drawn:
    """A question and its clip: draft, and the frames uint8 [24, 112, 112, 3]."""

    name: str
    family: str
    draft: Draft

    @cached_property
    def frames(self) -> np.ndarray:
        return np.stack([self.draft.draw(i) for i in range(self.draft.frames)])

    @property
    def cells(self) -> list[int]:
        """The half seconds that show the answer."""
        events = self.draft.meta["events"]
        return [cell for one in events for cell in range(round(one["start"] / CELL), round(one["end"] / CELL))]


def drawn(seed: int, family: str, split: int, index: int) -> Drawn:
    """Question `index` of a family."""
    duration = SECONDS / 2 if family == "find" else SECONDS  # `find` draws clips of twice the duration
    setting = Setting((SIDE, SIDE), duration, 4, WATCHED[family])
    rng = np.random.default_rng([seed, split, zlib.crc32(family.encode()), index])
    target = deal(family, setting, split, index)
    return Drawn(f"{family}-{index}", family, FAMILIES[family](rng, setting, target, index))


@cache
def processor_of(name: str) -> KeyeProcessor:
    """The processor of an encoder of `ENCODERS`."""
    return KeyeProcessor(_tokenizer(), encoder=ENCODERS[name], image={"min_tokens": 16, "max_tokens": 16})


@cache
def _tokenizer() -> Any:
    return train_tokenizer(texts(0), 1024)


def clip_part(one: Drawn) -> dict[str, Any]:
    """The clip in a message; encoders sample it."""
    return {"type": "video", "video": one.frames, "source_fps": 4.0}


def still_part(one: Drawn, cell: int, as_video: bool) -> dict[str, Any]:
    """The frame of a half second, as an image or as a video of one frame with its time."""
    frame = one.draft.draw(2 * cell)
    if not as_video:
        return {"type": "image", "image": frame}
    return {"type": "video", "video": frame[None], "timestamps": [cell / 2]}


def chat(one: Drawn, *parts: dict[str, Any], answer: bool = False) -> list[dict[str, Any]]:
    """The question about media, and its answer."""
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": one.draft.question}]}]
    return [*turns, {"role": "assistant", "content": one.draft.answer}] if answer else turns


def stills(seed: int, tokens: int) -> Iterator[list[Any]]:
    """Batches of about `tokens` tokens of stills: 1 to 6 unrelated pictures in a chat, one of which shows the answer.

    Half of the chats have them as images, half as the frames of a video, with times and all their tokens.
    """
    processor, draw = processor_of("slow only"), np.random.default_rng([seed, STILLS])
    index = 0
    while True:
        batch: list[Any] = []
        while sum(map(len, batch)) < tokens:
            one = drawn(seed, list(READ)[index % len(READ)], STILLS, index // len(READ))
            pictures = [_other(seed, draw) for _ in range(int(draw.integers(0, MOST_STILLS)))]
            pictures.insert(int(draw.integers(0, len(pictures) + 1)), one.draft.draw(2 * int(draw.choice(one.cells))))
            parts = [{"type": "image", "image": picture} for picture in pictures]
            if index % 4 > 1:
                times = np.sort(draw.choice(CELLS, len(pictures), replace=False)) / 2
                parts = [{"type": "video", "video": np.stack(pictures), "timestamps": times.tolist()}]
            batch.append(processor.sample(chat(one, *parts, answer=True)))
            index += 1
        yield batch


def _other(seed: int, draw: np.random.Generator) -> np.ndarray:
    """A frame of another clip that does not show its answer."""
    family = list(READ)[int(draw.integers(len(READ)))]
    one = drawn(seed, family, STILLS, int(draw.integers(10**6, 10**7)))
    return one.draft.draw(2 * int(draw.choice([cell for cell in range(CELLS) if cell not in one.cells])))


def clips(name: str, seed: int, tokens: int) -> Iterator[list[Any]]:
    """Batches of about `tokens` tokens of clips of all families under one encoder."""
    processor, index = processor_of(name), 0
    while True:
        batch: list[Any] = []
        while sum(map(len, batch)) < tokens:
            one = drawn(seed, list(WATCHED)[index % len(WATCHED)], TRAIN, index // len(WATCHED))
            batch.append(processor.sample(chat(one, clip_part(one), answer=True)))
            index += 1
        yield batch


def new_model(seed: int) -> KeyeForConditionalGeneration:
    """An untrained tiny model."""
    torch.manual_seed(seed)
    config = processor_of("slow + fast").configure(KeyeConfig.preset("tiny", vocab_size=1024))
    return KeyeForConditionalGeneration(config)


def train(
    model: KeyeForConditionalGeneration,
    batches: Iterator[list[Any]],
    steps: int,
    rate: float,
    say: Callable[[str], None],
) -> float:
    """Train all parameters; returns the processor seconds."""
    optimizer, schedule = build_optimizer(
        model, OptimizerConfig(learning_rate=rate, warmup=20, schedule="cosine"), steps
    )
    pad, began, wall = _tokenizer().pad_token_id, time.process_time(), time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        loss = model(**pack(next(batches), pad=pad)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 4) == 0:
            left = (time.monotonic() - wall) / step * (steps - step)
            say(f"step {step} of {steps}, loss {float(loss.detach()):.3f}, {left:.0f} s left")
    return time.process_time() - began


class Asked:
    """Held-out questions whose clips are given as parts of messages."""

    name = "SlowFastWorld"

    def __init__(self, questions: Sequence[Drawn], part: Callable[[Drawn], dict[str, Any]]) -> None:
        self.questions, self.part = questions, part

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        for one in self.questions:
            draft = one.draft
            yield Question(
                one.name, one.family, chat(one, self.part(one)), draft.answer, draft.options, draft.tolerance
            )


def answers(
    model: KeyeForConditionalGeneration,
    questions: Sequence[Drawn],
    encoder: str,
    part: Callable[[Drawn], dict[str, Any]] = clip_part,
) -> list[int]:
    """1 for each question that is answered correctly, else 0."""
    asked = Asked(questions, part)
    report = evaluate(model, processor_of(encoder), asked, batch_size=30, max_new_tokens=8)
    return [int(outcome.correct) for outcome in report.outcomes]


def heldout(seed: int, families: Sequence[str], each: int) -> list[Drawn]:
    """Held-out questions."""
    return [drawn(seed, family, HELDOUT, index) for family in families for index in range(each)]


def with_slow(one: Drawn, slow: Sequence[int]) -> dict[str, Any]:
    """The clip with given slow frames, of 12, and 4 tokens of every frame; features are pooled."""
    frames = torch.from_numpy(one.frames).permute(0, 3, 1, 2)
    video = SlowFastEncoder(**ENCODERS["slow + fast"])(frames, source_fps=4.0, dtype=torch.uint8)
    plan = video.plan
    rows = [(frame, kind) for frame in range(CELLS) for kind in ([0, 1] if frame in slow else [1])]
    at = torch.tensor([plan.frame_indices.unique().tolist()[frame] for frame, _ in rows])
    times = dict(zip(plan.frame_indices.tolist(), plan.timestamps.tolist(), strict=True))
    changed = replace(
        plan,
        frame_types=torch.tensor([kind for _, kind in rows]),
        frame_indices=at,
        timestamps=torch.tensor([times[index] for index in at.tolist()]),
        similarity=torch.full((len(rows),), float("nan")),
    )
    return {"type": "video", "video": EncodedVideo(video.pixel_values, video.grid_thw, changed, format=video.format)}


def changed_frames(one: Drawn) -> list[int]:
    """Three slow frames by this project's measure, with evenly spaced ones where fewer frames differ."""
    settings = {**SIZES, "measure": "patch_l1", "policy": "adaptive_budget:share=0.25"}
    plan = SlowFastEncoder(**settings).plan(torch.from_numpy(one.frames).permute(0, 3, 1, 2), source_fps=4.0)
    found = (plan.frame_types == 0).nonzero()[:, 0].tolist()
    even = [cell for cell in range(0, CELLS, CELLS // SLOW) if cell not in found]
    return sorted([*found, *even][:SLOW])


@torch.no_grad()
def confident_frames(model: KeyeForConditionalGeneration, questions: Sequence[Drawn]) -> list[list[int]]:
    """For each question the three frames about which, each alone, the reader answers with most confidence.

    Confidence is the largest probability of a first token of the answer.
    """
    processor, found = processor_of("slow only"), []
    for one in questions:
        parts = [still_part(one, cell, as_video=True) for cell in range(CELLS)]
        samples = [processor.sample(chat(one, part), add_generation_prompt=True) for part in parts]
        batch = processor.collate(samples, padding_side="left")
        batch.pop("labels")
        logits = model.eval()(**batch, logits_to_keep=1).logits[:, -1]
        best = logits.float().softmax(-1).amax(-1).topk(SLOW).indices.tolist()
        found.append(sorted(best))
    return found
