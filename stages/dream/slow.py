"""The slow stage: a video diffusion model learns what the camera sees next, given clean past frames and the action.

Source: SlowFast-VGen (arXiv 2410.23277), section 3.2. Every sample of a step is drawn from (seed, step, index), so that
a resumed run, or one with another number of processes, trains on the same samples and noise.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from keye.dream.diffusion import LEAST_LEVEL, conditional_errors, unconditional_errors
from keye.dream.model import DreamModel
from keye.dream.scenes import CHUNK, any_walk
from keye.errors import CheckpointError, writing
from keye.files import write_atomically
from stages.dream.recipe import DreamRecipe
from stages.dream.state import (
    MetricsFile,
    load_checkpoint,
    rank,
    record_inputs,
    save_checkpoint,
    sum_gradients,
    wait,
    world,
)
from stages.optimizer import build_optimizer
from stages.typed_toml import to_toml

CHECKPOINT = "slow.safetensors"
# Keys that do not change what is trained by the slow stage.
FREE = ("checkpoint_every", "fast", "loop", "name")


def train(recipe: DreamRecipe, run: str | Path, device: torch.device | None = None) -> DreamModel:
    """Train the slow stage into `run`/model; the same call again resumes, or returns a finished model.

    Collective. A run with another recipe is refused.

    Raises:
        KeyeError: a mistake that the user can correct.
    """
    run, device = Path(run), device or torch.device("cpu")
    _begin(recipe, run)
    torch.manual_seed(recipe.seed)
    model = DreamModel(recipe.model).to(device).train()
    optimizer, schedule = build_optimizer(model, recipe.optimizer, recipe.steps)
    begin = load_checkpoint(run / CHECKPOINT, model, optimizer)
    metrics = MetricsFile(run / "metrics.jsonl", begin)
    with progress("slow stage", recipe.steps, begin) as advance:
        for step in range(begin, recipe.steps):
            for group, rate in zip(optimizer.param_groups, _rates(schedule, step), strict=True):
                group["lr"] = rate
            losses = slow_step(model, recipe, step, device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics.add(step=step + 1, **losses)
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                if rank() == 0:
                    save_checkpoint(run / CHECKPOINT, model, optimizer, step + 1)
                wait()
            advance(losses["loss"])
    if rank() == 0:
        model.save_pretrained(run / "model")
    wait()
    return model.eval()


def slow_step(model: DreamModel, recipe: DreamRecipe, step: int, device: torch.device) -> dict[str, float]:
    """Gradients of one step, summed over processes; the losses of its windows with and without a condition."""
    mine = range(rank(), recipe.batch, world())
    samples = [draw_sample(recipe, step, index) for index in mine]
    past = 1 if (step + 1) % recipe.single_past_every == 0 else CHUNK
    bare = round(recipe.unconditional * recipe.batch)
    sums = [0.0, 0.0]
    for kind in (0, 1):
        chosen = [sample for index, sample in zip(mine, samples, strict=True) if (index < bare) == bool(kind)]
        if not chosen:
            continue
        frames, noise, action, level = (torch.stack(parts).to(device) for parts in zip(*chosen, strict=True))
        if kind:
            errors = unconditional_errors(model, frames, noise, level)
        else:
            before, new = frames[:, CHUNK - past : CHUNK], frames[:, CHUNK:]
            errors = conditional_errors(model, before, new, action[:, CHUNK - past :], noise[:, CHUNK:], level)
        (errors.sum() / recipe.batch).backward()
        sums[kind] = float(errors.detach().sum())
    conditional, unconditional = sum_gradients(model, *sums)
    return {
        "loss": (conditional + unconditional) / recipe.batch,
        "conditional": conditional / max(recipe.batch - bare, 1),
        "unconditional": unconditional / max(bare, 1),
    }


def draw_sample(recipe: DreamRecipe, step: int, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample `index` of a step: frames and noise [8, 3, S, S], actions int64 [8], noise level [].

    The levels of a step's samples are spread evenly: a random offset and order of the step, then equal distances.
    """
    rng = np.random.default_rng([recipe.seed, step, index])
    path = any_walk(rng, 2)
    numbers = torch.Generator().manual_seed(int(rng.integers(2**62)))
    frames = path.frames[1:]
    shared = np.random.default_rng([recipe.seed, step])
    place = shared.permutation(recipe.batch)[index] / recipe.batch + shared.random()
    level = torch.tensor(LEAST_LEVEL + (1 - LEAST_LEVEL) * (place % 1.0), dtype=torch.float32)
    actions = torch.tensor(path.actions).repeat_interleave(CHUNK)
    return frames, torch.randn(frames.shape, generator=numbers), actions, level


class progress:
    """A progress bar with the remaining time on rank 0, and the latest loss; a context that yields `advance(loss)`."""

    def __init__(self, title: str, total: int, begin: int = 0) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, disable=rank() != 0)
        self.task = self.bar.add_task(title, total=total, completed=begin, loss="")

    def __enter__(self) -> "progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, loss: float) -> None:
        self.bar.update(self.task, advance=1, loss=f"loss {loss:.4f}")


def _rates(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> list[float]:
    return [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]


def _begin(recipe: DreamRecipe, run: Path) -> None:
    """Record the recipe, or check that the run was begun with the same one.

    Raises:
        CheckpointError: another recipe, or the directory cannot be written.
    """
    record_inputs(run / "slow.json", {key: value for key, value in asdict(recipe).items() if key not in FREE})
    if rank() == 0:
        with writing(run, "the run", CheckpointError):
            write_atomically(run / "recipe.toml", to_toml(recipe))
    wait()
