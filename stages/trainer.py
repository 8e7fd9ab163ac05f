"""The training loop of every stage: one step as a paragraph, metrics, progress, checkpoints, resume."""

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from keye.errors import KeyeError, RecipeError
from stages import engine as deep
from stages.checkpoints import load_checkpoint, save_checkpoint
from stages.data.loader import Loader
from stages.parallel import Grid, sum_over_ranks
from stages.recipe import StageRecipe
from stages.stage import Stage

MAX_BAD_STEPS = 20  # steps in a row with a loss that is not finite, before the run is given up


class Trainer:
    """Trains one stage's module.

    Args:
        stage, module: what is trained and its loss. recipe: the stage's. folder: `runs/<name>/<stage>`.
        micro_batches: batches a step on this rank. precision: "auto", "fp32" or "bf16".
    """

    def __init__(
        self, stage: Stage, module: nn.Module, loader: Loader, grid: Grid, recipe: StageRecipe, folder: Path,
        micro_batches: int, precision: str,
    ) -> None:  # fmt: skip
        self.stage, self.loader, self.grid, self.recipe, self.folder = stage, loader, grid, recipe, folder
        self.micro_batches, self.bad, self.asked_to_stop, self.stopping = micro_batches, 0, False, False
        self.engine = deep.build(
            module, lr=recipe.lr, steps=recipe.steps, warmup=recipe.warmup, schedule=recipe.schedule,
            weight_decay=recipe.weight_decay, betas=recipe.betas, clip=recipe.clip, zero=recipe.zero,
            accumulation=micro_batches, precision=precision,
        )  # fmt: skip
        self.step = 0
        found = load_checkpoint(self.engine, folder / "checkpoints")
        if found is not None:
            self.step, state = found
            if state:
                loader.load_state_dict(state)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step: draw, count over all ranks, forward and backward each batch, step."""
        started, stalled = time.perf_counter(), self.loader.stalled
        batches = [_move(self.loader.next()) for _ in range(self.micro_batches)]
        weights = float(sum_over_ranks(self._scalar(sum(self.stage.weight(batch, self.grid) for batch in batches))))
        # DeepSpeed averages over ranks and batches; multiplying by both leaves the plain sum over the global count.
        factor = self.grid.world * self.micro_batches / max(weights, 1e-12)
        total, lr, not_finite = 0.0, self.engine.get_lr()[0], 0
        for batch in batches:
            loss = self.stage.loss(self.engine, batch, self.grid)
            value = float(sum_over_ranks(loss.float()))
            finite = math.isfinite(value)
            not_finite += not finite
            self.engine.backward(loss * factor if finite else self._nothing())
            if not_finite:
                self._skip()
            self.engine.step()
            total += value if finite else 0.0
        not_finite += self._overflowed()
        self.bad = self.bad + 1 if not_finite else 0
        if self.bad > MAX_BAD_STEPS:
            raise KeyeError(f"{self.stage.name}: the loss was not finite {self.bad} times in a row; lower its lr")
        self.step += 1
        # Signals reach the ranks at different times; asked together, all stop after the same step.
        self.stopping = float(sum_over_ranks(self._scalar(self.asked_to_stop))) > 0
        kinds = _add_counts([batch["kinds"] for batch in batches], self.grid)
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        seconds, tokens = time.perf_counter() - started, sum(kinds.values())
        return {
            "step": self.step,
            "loss": total / max(weights, 1e-12),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,  # JSON knows no infinity
            "seconds": seconds,
            "stall_seconds": self.loader.stalled - stalled,
            "not_finite": not_finite,
            **{f"tokens_{kind}": count for kind, count in kinds.items()},
        }

    def _nothing(self) -> Tensor:
        """A loss of zero that touches every parameter: collectives go on as if the batch had been good."""
        return sum((p.nan_to_num() * 0).sum() for p in self.engine.module.parameters() if p.requires_grad)

    def _skip(self) -> None:
        """Let the optimizer's next step move nothing; the schedule sets the rate anew afterwards."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0

    def _overflowed(self) -> bool:
        """Whether the engine left the step out because a gradient was not finite though every loss was.

        It leaves out the schedule's step with it, which is made up for here.
        """
        overflowed = bool(getattr(self.engine.optimizer, "overflow", False))
        if overflowed:
            self.engine.lr_scheduler.step()
        return overflowed

    @staticmethod
    def _scalar(value: float) -> Tensor:
        return torch.tensor(float(value), device=deep.device())

    def run(self) -> None:
        """Train to the last step, writing metrics and checkpoints.

        Raises:
            KeyeError: SIGTERM came; the step was finished and saved, and the same command goes on from there.
        """
        before = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            self._run()
        finally:
            signal.signal(signal.SIGTERM, before)
            self.loader.close()

    def _ask_to_stop(self, *_: Any) -> None:
        self.asked_to_stop = True

    def _run(self) -> None:
        main = self.grid.rank == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics, board = self.folder / "metrics.jsonl", None
        if main:
            from torch.utils.tensorboard import SummaryWriter

            _cut(metrics, self.step)
            board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        columns = (
            TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        live = main and sys.stdout.isatty()
        with Progress(*columns, disable=not live) as bar:
            task = bar.add_task(self.stage.name, total=self.recipe.steps, completed=self.step, state="")
            while self.step < self.recipe.steps:
                values = self.train_step()
                if board is not None:
                    with metrics.open("a") as out:
                        out.write(json.dumps(values) + "\n")
                    for name, value in values.items():
                        if value is not None:
                            board.add_scalar(name, value, self.step)
                state = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
                bar.update(task, completed=self.step, state=state)
                every = max(1, self.recipe.steps // 10)
                if main and not live and (self.step % every == 0 or self.step == 1):
                    print(f"{self.stage.name} {self.step}/{self.recipe.steps}  {state}", flush=True)
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or self.stopping:
                    self.save()
                if self.stopping and self.step < self.recipe.steps:
                    raise KeyeError(f"{self.stage.name}: stopped at step {self.step}; the same command goes on from it")
        if board is not None:
            board.close()

    def save(self) -> None:
        """A checkpoint of the engine, the loader and the RNG."""
        save_checkpoint(self.engine, self.folder / "checkpoints", self.step, self.loader.state_dict())


def micro_batches(name: str, count: int, grid: Grid) -> int:
    """`count` packs a step, shared out over the data-parallel ranks.

    Raises:
        RecipeError: they do not divide.
    """
    if count % grid.data_size:
        raise RecipeError(f"{name}: {count} packs (or pairs) a step cannot be shared by {grid.data_size} ranks evenly")
    return count // grid.data_size


def _move(batch: dict[str, Any]) -> dict[str, Any]:
    to = deep.device()
    return {k: v.to(to, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _add_counts(counts: list[dict[str, int]], grid: Grid) -> dict[str, int]:
    kinds = ("video", "image", "text")
    mine = [sum(c.get(kind, 0) for c in counts) if grid.sequence_rank == 0 else 0 for kind in kinds]
    total = torch.tensor(mine, device=deep.device())
    if dist.is_initialized() and grid.world > 1:
        dist.all_reduce(total)
    return {kind: int(n) for kind, n in zip(kinds, total, strict=True) if n}


def _cut(metrics: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run takes again."""
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        metrics.write_text("".join(line + "\n" for line in lines))
