"""Training of one reader under one setting, and its answers to the questions of another split."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from scripts.bench.trained_reader.clips import CONTROLS, FAMILIES_ASKED, OPTIONS, Seen, controlled
from scripts.bench.trained_reader.network import Reader


@dataclass(frozen=True)
class Recipe:
    """How every reader is trained.

    Attributes:
        steps: optimizer steps.
        batch: clips of a step.
        rate: highest learning rate, after a tenth of the steps; it falls to zero by a cosine.
        seen_weight: weight of the loss of what the pictures show.
    """

    steps: int = 150
    batch: int = 24
    rate: float = 3e-3
    seen_weight: float = 1.0


def train(seen: Seen, recipe: Recipe, seed: int, log: bool = False) -> Reader:
    """A new reader, trained on the clips of one setting; `seed` is of weights, order and mirror images."""
    torch.manual_seed(seed)
    rng, reader = np.random.default_rng(seed), Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=recipe.rate, weight_decay=0.02)
    warmup = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warmup, recipe.steps))
    family = torch.zeros(len(seen), dtype=torch.long).index_put((seen.clip,), seen.family)
    turns = family == FAMILIES_ASKED.index("turn")  # a mirror image turns the other way
    order = np.concatenate([rng.permutation(len(seen)) for _ in range(-(-recipe.steps * recipe.batch // len(seen)))])
    for step in range(recipe.steps):
        clips = torch.from_numpy(np.unique(order[step * recipe.batch : (step + 1) * recipe.batch]))
        questions = torch.nonzero(torch.isin(seen.clip, clips))[:, 0]
        flip = torch.from_numpy(rng.integers(2, size=len(clips)) > 0) & ~turns[clips]
        logits, shown = reader.train()(seen, clips, questions, flip)
        asked = functional.cross_entropy(logits, seen.answers[questions])
        optimizer.zero_grad()
        (asked + recipe.seen_weight * shown).backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if log and (step + 1) % 25 == 0:
            print(f"  step {step + 1}  answers {asked.item():.3f}  shown {shown.item():.3f}", flush=True)
    return reader.eval()


def _rate(step: int, warmup: int, steps: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


@torch.no_grad()
def choices(reader: Reader, seen: Seen, batch: int = 64) -> np.ndarray:
    """The chosen option of every question, int64 [Q]."""
    chosen = np.zeros(len(seen.answers), int)
    for clips in torch.arange(len(seen)).split(batch):
        questions = torch.nonzero(torch.isin(seen.clip, clips))[:, 0]
        chosen[questions.numpy()] = reader(seen, clips, questions)[0].argmax(1).numpy()
    return chosen


def answers(reader: Reader, seen: Seen) -> dict[str, np.ndarray]:
    """The chosen option of every question, int64 [Q], without a control ("none") and under each."""
    return {name: choices(reader, seen if name == "none" else controlled(seen, name)) for name in ("none", *CONTROLS)}


def accuracies(chosen: np.ndarray, seen: Seen) -> dict[str, float]:
    """Family → share of correct answers."""
    right, family = chosen == seen.answers.numpy(), seen.family.numpy()
    return {name: round(float(right[family == place].mean()), 3)
            for place, name in enumerate(FAMILIES_ASKED) if (family == place).any()}  # fmt: skip


def majority(train: Seen, seen: Seen) -> np.ndarray:
    """For every question the option that is most often correct in training among those of its family and word."""
    counts: dict[tuple[int, int, int], int] = {}
    rows = zip(train.family.tolist(), train.word.tolist(), train.options.tolist(), train.answers.tolist(), strict=True)
    for family, word, options, answer in rows:
        key = family, word, options[answer]
        counts[key] = counts.get(key, 0) + 1
    chosen = []
    for family, word, options in zip(seen.family.tolist(), seen.word.tolist(), seen.options.tolist(), strict=True):
        chosen.append(max(range(OPTIONS), key=lambda place: counts.get((family, word, options[place]), 0)
                          if options[place] >= 0 else -1))  # fmt: skip
    return np.array(chosen)
