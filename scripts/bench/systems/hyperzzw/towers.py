"""The tiny model with either mixer: the same data, steps and decoder; stills with corners and clips of two sizes."""

import time
from typing import Any

import torch
from torch import nn

from keye.evaluation import Question, evaluate
from keye.model import flops
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer
from keye.world import texts
from scripts.bench.places import HELDOUT, TRAIN, drawn, messages
from stages.data.collate import pack
from stages.optimizer import OptimizerConfig, build_optimizer

FAMILIES = {"image_place": 1.0, "motion": 2.0}
TOKENS, RATE = 2048, 2e-3


def new_processor() -> KeyeProcessor:
    """The tiny recipe's: slow frames of 16 tokens and fast ones of 4."""
    encoder = {
        "measure": "patch_l1", "threshold": 0.8, "fps": 2.0, "max_tokens": 512, "min_tokens_per_frame": 4,
        "max_tokens_per_frame": 16,
    }  # fmt: skip
    return KeyeProcessor(train_tokenizer(texts(0), 1024), encoder=encoder, image={"min_tokens": 4, "max_tokens": 16})


class Heldout:
    """Held-out questions in memory, the same for every run."""

    name = "SlowFastWorld"

    def __init__(self, number: int, first: int = 0) -> None:
        drafts = [(f, i, drawn(f, HELDOUT, first + i)) for f in FAMILIES for i in range(number)]
        self.questions = [Question(f"{f}-{i}", f, messages(d), d.answer, d.options) for f, i, d in drafts]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Any:
        return iter(self.questions)


def frames_of(sample: Sample) -> list[tuple[int, int]]:
    """(height, width) in patches of every frame and still."""
    grids = [grid for grid in (sample.image_grid_thw, sample.video_grid_thw) if grid is not None]
    return [(int(row[1]), int(row[2])) for grid in grids for row in grid]


def run_of(mixer: str, seed: int, steps: int, questions: int, first: int = 0) -> dict[str, Any]:
    """Train and evaluate: right answers of each family, CPU seconds, operations, parameters of the tower.

    Weights and samples are those of the seed; the two mixers read the same samples in the same order.
    """
    processor = new_processor()
    torch.manual_seed(seed)
    config = KeyeConfig.preset("tiny", {"mixer": mixer}, vocab_size=1024)
    model = KeyeForConditionalGeneration(processor.configure(config))
    settings = OptimizerConfig(learning_rate=RATE, warmup=20, schedule="constant")
    optimizer, schedule = build_optimizer(model, settings, steps)
    counts, spent = dict.fromkeys(FAMILIES, 1_000_000 * seed), dict.fromkeys(FAMILIES, 0.0)
    seconds, operations, sizes = 0.0, 0, dict[tuple[int, int], int]()
    for _ in range(steps):
        samples = list[Sample]()
        while sum(map(len, samples)) < TOKENS:
            family = min(spent, key=lambda name: spent[name] / FAMILIES[name])
            draft = drawn(family, TRAIN, counts[family])
            samples.append(processor.sample([*messages(draft), {"role": "assistant", "content": draft.answer}]))
            counts[family] += 1
            spent[family] += len(samples[-1])
        batch = pack(samples, pad=processor.tokenizer.pad_token_id)
        frames = [frame for sample in samples for frame in frames_of(sample)]
        labels = int((batch["shift_labels"] != -100).sum())
        operations += flops.training_step(model.config, frames, [len(sample) for sample in samples], labels)
        for size in frames:
            sizes[size] = sizes.get(size, 0) + 1
        began = time.process_time()
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - began
    report = evaluate(model, processor, Heldout(questions, first), batch_size=25, max_new_tokens=26)
    right = {family: [] for family in FAMILIES}
    for answer in report.outcomes:
        right[answer.family].append(bool(answer.correct))
    return {
        "right": right, "seconds": seconds, "operations": operations, "loss": float(loss.detach()),
        "tower": sum(p.numel() for p in model.visual.parameters()),
        "frames": [[*size, count] for size, count in sorted(sizes.items())],
    }  # fmt: skip
