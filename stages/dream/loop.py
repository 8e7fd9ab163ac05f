"""The slow-fast loop of SlowFast-VGen (arXiv 2410.23277, algorithm 1): the slow weights learn to use a fast memory.

A round walks through some episodes. Each has an empty memory; for every chunk the memory of that moment is stored with
the chunk before and the true chunk after it, then the memory is written with both. Afterwards the slow weights are
updated on the conditional loss of the stored chunks, each under its stored memory, which stays fixed.
"""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keye.dream.diffusion import conditional_errors, draw_noise
from keye.dream.episode import Episode
from keye.dream.model import DreamModel
from keye.dream.scenes import CHUNK, circling_walk, returning_walk
from keye.errors import RecipeError
from keye.memory import TemporaryLora, attach
from stages.dream.recipe import DreamRecipe
from stages.dream.slow import progress
from stages.dream.state import (
    MetricsFile,
    digest,
    load_checkpoint,
    rank,
    record_inputs,
    save_checkpoint,
    sum_gradients,
    wait,
    world,
)

CHECKPOINT = "loop.safetensors"


@dataclass
class Stored:
    """A chunk of an episode: the frames before it, the chunk, the actions of both, and the memory of that moment.

    past [P, 3, S, S], new [4, 3, S, S], actions int64 [P + 4]. memory: factors without Adam's moments; writes: so many
    steps have been taken.
    """

    past: Tensor
    new: Tensor
    actions: Tensor
    memory: dict[str, Tensor]
    writes: int


def loop(model: DreamModel, recipe: DreamRecipe, out: str | Path) -> DreamModel:
    """Run the rounds of the recipe and write `out`/model; the same call again resumes after the last complete round.

    Collective. The model is trained in place.

    Raises:
        RecipeError: episodes or chunks of a step that do not divide among the processes.
        CheckpointError: the loop in `out` was begun with another model or recipe; only the rounds may change.
    """
    out, use = Path(out), recipe.loop
    for key in ("episodes", "group"):
        if getattr(use, key) % world():
            raise RecipeError(f"loop.{key} is {getattr(use, key)}; give a multiple of the {world()} processes")
    settings = asdict(dataclasses.replace(use, rounds=1)) | {"seed": recipe.seed, "fast": asdict(recipe.fast)}
    record_inputs(out / "loop.json", {"model": digest(model.state_dict().values()), **settings})
    optimizer = torch.optim.AdamW(model.parameters(), lr=use.learning_rate, weight_decay=0.0)
    begin = load_checkpoint(out / CHECKPOINT, model, optimizer)
    metrics = MetricsFile(out / "metrics.jsonl", begin, "round")
    with progress("slow-fast loop", use.rounds, begin) as advance:
        for number in range(begin, use.rounds):
            stored = [
                chunk
                for index in range(rank(), use.episodes, world())
                for chunk in fast_episode(model, recipe, number, index)
            ]
            losses = [slow_update(model, optimizer, recipe, stored, number, step) for step in range(use.updates)]
            metrics.add(round=number + 1, loss=float(np.mean(losses)), first=losses[0], last=losses[-1])
            if rank() == 0:
                save_checkpoint(out / CHECKPOINT, model, optimizer, number + 1)
            wait()
            advance(losses[-1])
    if rank() == 0:
        model.save_pretrained(out / "model")
    wait()
    return model.eval()


def fast_episode(model: DreamModel, recipe: DreamRecipe, number: int, index: int) -> list[Stored]:
    """Episode `index` of a round: the memory is written with true chunks and stored before each write."""
    rng = np.random.default_rng([recipe.seed, 1, number, index])
    path = returning_walk(rng, int(rng.integers(1, 3))) if rng.random() < 0.5 else circling_walk(rng)
    device = next(model.parameters()).device
    frames, seed = path.frames.to(device), int(rng.integers(2**31))
    settings = recipe.fast if recipe.loop.memory else dataclasses.replace(recipe.fast, write="none")
    model.eval()
    stored = []
    with Episode(model, frames[:1], settings, seed) as episode:
        for chunk, action in enumerate(path.actions):
            start = 1 + chunk * CHUNK
            past = episode.frames[-settings.past :]
            actions = episode.actions[-len(past) :] + [action] * CHUNK
            new = frames[start : start + CHUNK]
            memory = {} if episode.memory is None else _factors(episode.memory)
            writes = 0 if episode.memory is None else episode.memory.writes
            stored.append(Stored(past, new, torch.tensor(actions, device=device), memory, writes))
            if chunk + 1 < len(path.actions):
                episode.watch(new, action)
    return stored


def slow_update(
    model: DreamModel,
    optimizer: torch.optim.Optimizer,
    recipe: DreamRecipe,
    stored: list[Stored],
    number: int,
    step: int,
) -> float:
    """One step on the slow weights; every chunk under its own fixed memory. Returns the loss over all processes."""
    use, share = recipe.loop, recipe.loop.group // world()
    rng = np.random.default_rng([recipe.seed, 2, number, step, rank()])
    numbers = torch.Generator().manual_seed(int(rng.integers(2**62)))
    fast, total = recipe.fast, 0.0
    model.train()
    for pick in rng.choice(len(stored), share, replace=len(stored) < share).tolist():
        chunk, memory = stored[pick], None
        if chunk.memory:
            memory = attach(model, fast.rank, fast.alpha, fast.match)
            memory.restore(chunk.memory, chunk.writes)
        try:
            past, new, actions = (
                value[None].expand(use.draws, *value.shape) for value in (chunk.past, chunk.new, chunk.actions)
            )
            loss = conditional_errors(model, past, new, actions, *draw_noise(new, numbers)).mean() / use.group
            loss.backward()
            total += float(loss.detach())
        finally:
            if memory is not None:
                memory.detach()
    (total,) = sum_gradients(model, total)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _factors(memory: TemporaryLora) -> dict[str, Tensor]:
    return {name: value for name, value in memory.state().items() if name.endswith((".A", ".B"))}
