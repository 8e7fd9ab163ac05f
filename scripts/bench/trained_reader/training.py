"""Training of one reader under one setting, and its answers to the questions of another split."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from scripts.bench.trained_reader.clips import CONTROLS, FAMILIES_ASKED, GRID, OPTIONS, STATES, Seen, controlled
from scripts.bench.trained_reader.network import Eye, Reader


@dataclass(frozen=True)
class Recipe:
    """How every reader is trained.

    Attributes:
        steps: optimizer steps of a reader.
        batch: clips of a step.
        rate: highest learning rate, after a tenth of the steps; it falls to zero by a cosine.
        looks: optimizer steps of an eye.
        pictures: pictures of such a step.
        look_rate: highest learning rate of an eye.
        blur: smallest scale to which pictures are reduced and enlarged again while an eye is trained.
    """

    steps: int = 500
    batch: int = 24
    rate: float = 2e-3
    looks: int = 500
    pictures: int = 64
    look_rate: float = 5e-3
    blur: float = 0.7


def train_eye(seen: Seen, recipe: Recipe, seed: int, log: bool = False) -> Eye:
    """An eye that says what single pictures show, from the clips with every frame slow."""
    torch.manual_seed(seed)
    rng, eye = np.random.default_rng(seed), Eye()
    clip = torch.repeat_interleave(torch.arange(len(seen)), seen.starts.diff())
    # The first entry of every different picture.
    first = torch.from_numpy(np.unique(seen.picture.numpy(), return_index=True)[1])
    states, tags = seen.states[clip[first], seen.cells[first]], seen.tags[clip[first]]
    weight = torch.ones(STATES)
    weight[0] = 0.3  # most columns show nothing
    optimizer, schedule = _optimizer(eye, recipe.look_rate, recipe.looks)
    for step in range(recipe.looks):
        chosen = torch.from_numpy(rng.integers(len(first), size=recipe.pictures))
        pictures, state, tag = seen.pictures[chosen].float(), states[chosen], tags[chosen]
        scale = rng.uniform(recipe.blur, 1)
        small = functional.interpolate(pictures, scale_factor=scale, mode="bilinear")
        pictures = functional.interpolate(small, GRID, mode="bilinear")
        if step % 2:
            pictures, state, tag = pictures.flip(-1), state.flip(-1), tag.flip(-1)
        said, coloured = eye.train()(pictures)
        loss = functional.cross_entropy(said, state, weight) + functional.cross_entropy(coloured, tag)
        _step(eye, loss, optimizer, schedule)
        if log and (step + 1) % 100 == 0:
            print(f"  look {step + 1}  loss {loss.item():.3f}", flush=True)
    return eye.eval()


def train(seen: Seen, shown: torch.Tensor, recipe: Recipe, seed: int, log: bool = False) -> Reader:
    """A new reader, trained on the clips of one setting.

    Args:
        shown: what an eye sees in its pictures, float [U, 15, 20].
        seed: of weights, order and mirror images.
    """
    torch.manual_seed(seed)
    rng, reader = np.random.default_rng(seed), Reader()
    optimizer, schedule = _optimizer(reader, recipe.rate, recipe.steps)
    family = torch.zeros(len(seen), dtype=torch.long).index_put((seen.clip,), seen.family)
    turns = family == FAMILIES_ASKED.index("turn")  # a mirror image turns the other way
    order = np.concatenate([rng.permutation(len(seen)) for _ in range(-(-recipe.steps * recipe.batch // len(seen)))])
    for step in range(recipe.steps):
        clips = torch.from_numpy(np.unique(order[step * recipe.batch : (step + 1) * recipe.batch]))
        questions = torch.nonzero(torch.isin(seen.clip, clips))[:, 0]
        flip = torch.from_numpy(rng.integers(2, size=len(clips)) > 0) & ~turns[clips]
        logits = reader.train()(seen, shown, clips, questions, flip)
        loss = functional.cross_entropy(logits, seen.answers[questions])
        _step(reader, loss, optimizer, schedule)
        if log and (step + 1) % 100 == 0:
            print(f"  step {step + 1}  loss {loss.item():.3f}", flush=True)
    return reader.eval()


def _optimizer(
    model: torch.nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    warmup = max(1, steps // 10)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warmup, steps))


def _step(
    model: torch.nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def _rate(step: int, warmup: int, steps: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


@torch.no_grad()
def choices(reader: Reader, seen: Seen, shown: torch.Tensor, batch: int = 64) -> np.ndarray:
    """The chosen option of every question, int64 [Q]."""
    chosen = np.zeros(len(seen.answers), int)
    for clips in torch.arange(len(seen)).split(batch):
        questions = torch.nonzero(torch.isin(seen.clip, clips))[:, 0]
        chosen[questions.numpy()] = reader(seen, shown, clips, questions).argmax(1).numpy()
    return chosen


def answers(eye: Eye, reader: Reader, seen: Seen) -> dict[str, np.ndarray]:
    """The chosen option of every question, int64 [Q], without a control ("none") and under each."""
    shown, found = eye.look(seen.pictures), {}
    for name in ("none", *CONTROLS):
        changed = seen if name == "none" else controlled(seen, name)
        look = eye.look(changed.pictures[:1]).expand_as(shown) if name == "zeroed" else shown
        found[name] = choices(reader, changed, look)
    return found


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
