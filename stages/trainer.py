"""The training loop of every stage: one step as a paragraph, checkpoints, resume."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.checkpoint.shards import Stored
from keye.errors import CheckpointError, KeyeError, RecipeError, writing
from keye.files import write_atomically
from stages.data.items import COUNTS
from stages.data.loader import Loader
from stages.distributed import engine as deep
from stages.distributed.checkpoints import PendingCheckpoint, load_checkpoint, start_checkpoint
from stages.distributed.parallel import ParallelDims, sum_over_ranks
from stages.distributed.ranks import first_rank
from stages.metrics import MetricsLogger, find_peak, operations, own_operations, step_summary
from stages.recipe import StageRecipe
from stages.recipe_checks import KINDS
from stages.report.findings import thinned
from stages.signals import REQUESTS, SignalRequests
from stages.skip_step import StepGuard
from stages.stage import Stage

PEAK = "peak.json"  # the peak that the MFU in metrics.jsonl is a share of
LOADER_TIMEOUT = 30.0  # seconds that a rank which failed alone waits for its loader, which may wait for others


class Trainer:
    """Trains one stage's module.

    Args:
        stage, module: what is trained and its loss. recipe: the stage's. folder: `runs/<name>/<stage>`.
        micro_batches: batches a step on this rank. precision: "auto", "fp32" or "bf16". trackers: get every step's
            metrics. config: the complete recipe as plain values, for the trackers.
        sources: where the exact start of parameters is on disk (`engine.build`). heldout: batches, a list for each
            step, that nothing trains on.
    """

    def __init__(
        self, stage: Stage, module: nn.Module, loader: Loader, grid: ParallelDims, recipe: StageRecipe, folder: Path,
        micro_batches: int, precision: str, trackers: tuple[str, ...] = (), config: dict[str, Any] | None = None,
        sources: Mapping[nn.Parameter, Stored] | None = None, heldout: Sequence[list[dict[str, Any]]] = (),
    ) -> None:  # fmt: skip
        self.stage, self.module, self.loader, self.grid, self.recipe = stage, module, loader, grid, recipe
        self.folder, self.micro_batches, self.heldout = folder, micro_batches, heldout
        self.requests = SignalRequests()  # of this rank
        self.agreed: set[str] = set()  # requests of any rank, the same on all; "written": of all ranks
        self.begun: PendingCheckpoint | None = None  # a checkpoint that is being written in the background
        self.engine = deep.build(
            module, recipe, recipe.steps, zero=recipe.zero, accumulation=micro_batches, precision=precision,
            sources=sources, hpz=recipe.hpz,
        )  # fmt: skip
        if recipe.async_checkpoints:
            from stages.distributed.background import write_in_background

            write_in_background(self.engine)
        self.guard = StepGuard(stage.name, recipe.spike_loss, recipe.spike_norm)
        deep.skip_steps_when(self.engine, self.guard.should_skip)
        self.peak = find_peak(precision)
        self.step = 0
        found = load_checkpoint(self.engine, folder / "checkpoints")
        if found is not None:
            self.step, state = found
            self.guard.load_state_dict(state["guard"])
            if state["loader"]:
                loader.load_state_dict(state["loader"])
        self.metrics_logger = MetricsLogger(
            stage.name, recipe.steps, folder, self.step, grid.rank == 0, step_summary, trackers, config
        )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step: draw, count over all ranks, forward and backward each batch, step."""
        started, stalled = time.perf_counter(), self.loader.stalled
        batches = [_move(self.loader.next()) for _ in range(self.micro_batches)]
        weights = float(sum_over_ranks(self._scalar(sum(self.stage.weight(batch, self.grid) for batch in batches))))
        # DeepSpeed averages over ranks and batches; multiplying by both leaves the plain sum over the global count.
        factor = self.grid.world * self.micro_batches / max(weights, 1e-12)
        total, lr = 0.0, self.engine.get_lr()[0]
        self.guard.begin()
        self.stage.begin(self.engine, batches, self.grid)
        for batch in batches:
            loss = self.stage.loss(self.engine, batch, self.grid)
            value = float(sum_over_ranks(loss.float()))
            finite = math.isfinite(value)
            self.guard.not_finite += not finite
            # Also of a loss that is not finite: collectives run as in every step, and the guard skips the step.
            self.engine.backward(loss * factor)
            total += value if finite else 0.0
            self.guard.loss = total / max(weights, 1e-12)  # complete when the optimizer steps, after the last batch
            self.engine.step()
        self._step_schedule()
        self.guard.end()
        self.step += 1
        return self._values(batches, lr, time.perf_counter() - started, self.loader.stalled - stalled)

    def heldout_loss(self) -> float:
        """The loss on the held-out batches; collective. No weight changes, and every rank makes as many passes.

        The module stays in training mode, in which a rank without pictures also runs the tower: ranks whose
        collectives differ would wait for one another.
        """
        mine = torch.zeros(2, dtype=torch.float64, device=deep.device())  # summed loss, and its divisor
        for step in self.heldout:
            batches = [_move(batch) for batch in step]
            self.stage.begin(self.engine, batches, self.grid)
            for batch in batches:
                with torch.no_grad():
                    mine[0] += self.stage.loss(self.engine, batch, self.grid).double()
                mine[1] += self.stage.weight(batch, self.grid)
        total, weight = sum_over_ranks(mine).tolist()
        return total / max(weight, 1e-12)

    def _values(self, batches: list[dict[str, Any]], lr: float, seconds: float, stalled: float) -> dict[str, Any]:
        """The metrics of a step; all sums over the ranks are taken in one collective."""
        counts = self.grid.sequence_rank == 0  # one rank of a sequence group counts for the complete pack
        mine = {kind: sum(batch["kinds"].get(kind, 0) for batch in batches) if counts else 0 for kind in KINDS}
        mine |= {name: sum(b["thinned"][name] for b in batches if "thinned" in b) if counts else 0 for name in COUNTS}
        mine["flops"] = sum(operations(self.module, batch) for batch in batches) if counts else 0
        mine["stalled"] = stalled
        mine |= {name: name in self.requests.pending for name in REQUESTS.values()}
        mine["written"] = self.begun is not None and self.begun.written
        sums = sum_over_ranks(torch.tensor(list(mine.values()), dtype=torch.float64, device=deep.device())).tolist()
        every = dict(zip(mine, sums, strict=True))
        self.agreed = {name for name in REQUESTS.values() if every[name]}
        self.agreed |= {"written"} if every["written"] == self.grid.world else set()
        kinds = {kind: int(every[kind]) for kind in KINDS if every[kind]}
        imbalance = self._imbalance([own_operations(self.module, batch, self.grid) for batch in batches])
        norm = deep.gradient_norm(self.engine) if math.isnan(self.guard.norm) else self.guard.norm
        return {
            "step": self.step,
            "loss": self.guard.loss,
            "tokens": sum(kinds.values()),
            "tokens_per_second": sum(kinds.values()) / seconds,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,  # JSON knows no infinity
            "seconds": seconds,
            "stall_seconds": stalled,
            "stall_share": every["stalled"] / self.grid.world / seconds,
            "flops": every["flops"],
            "mfu": every["flops"] / seconds / self.peak.flops,
            "imbalance": imbalance,
            "not_finite": self.guard.not_finite,
            "skipped": self.guard.skipped,
            **{f"tokens_{kind}": count for kind, count in kinds.items()},
            **{name: int(every[name]) for name in COUNTS},
        }

    def _imbalance(self, rounds: list[float]) -> float:
        """By how much the slowest ranks of all rounds exceed the mean.

        Args:
            rounds: operations of this rank in each round.
        """
        mine = torch.tensor(rounds, dtype=torch.float64, device=deep.device())
        most, mean = mine.clone(), float(sum_over_ranks(mine).sum()) / self.grid.world
        if self.grid.world > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most.sum()) / mean - 1

    def _step_schedule(self) -> None:
        """Take the schedule's step that the engine leaves out after a gradient that is not finite."""
        if getattr(self.engine.optimizer, "overflow", False):
            self.engine.lr_scheduler.step()

    @staticmethod
    def _scalar(value: float) -> Tensor:
        return torch.tensor(float(value), device=deep.device())

    def run(self) -> None:
        """Train to the last step and write metrics and checkpoints.

        SIGUSR1 requests a checkpoint, SIGTERM a checkpoint and the end.

        Raises:
            KeyeError: after SIGTERM; the step was finished and saved, and the same command resumes from it.
            CheckpointError: on all ranks, when rank 0 cannot write the metrics.
        """
        patience: float | None = LOADER_TIMEOUT
        try:
            with self.requests, self.metrics_logger:
                self._run()
            patience = None
        except KeyeError:  # all ranks agree on these
            patience = None
            raise
        finally:
            self.loader.close(patience)

    def _run(self) -> None:
        first_rank(self._write_peak)
        while self.step < self.recipe.steps:
            values, every = self.train_step(), self.recipe.heldout_every
            if every and (self.step % every == 0 or self.step == self.recipe.steps):
                values["heldout_loss"] = self.heldout_loss()
            self._log(values)
            if "written" in self.agreed:
                self.finish_saving()
            last = self.step == self.recipe.steps
            if self.step % self.recipe.checkpoint_every == 0 or last or self.agreed & {*REQUESTS.values()}:
                self.save()
            if last or "stop" in self.agreed:
                self.finish_saving()
            if "stop" in self.agreed and self.step < self.recipe.steps:
                raise KeyeError(f"{self.stage.name}: stopped at step {self.step}; the same command resumes from it")
            self.requests.pending -= self.agreed

    def _write_peak(self) -> None:
        peak = {"peak_flops": self.peak.flops, "peak_source": self.peak.source, "processes": self.grid.world}
        with writing(self.folder / PEAK, kind=CheckpointError):
            write_atomically(self.folder / PEAK, json.dumps(peak) + "\n")

    def _log(self, values: dict[str, Any]) -> None:
        self.metrics_logger.log(values)
        if values["skipped"]:
            self.metrics_logger.note(f"step skipped: {values['skipped']}")
        if self.step == self.recipe.steps and self.grid.rank == 0:
            self.metrics_logger.note(thinned(self.folder / "metrics.jsonl"))

    def save(self) -> None:
        """A checkpoint of the engine, the loader, the guard and the RNG, complete when this returns; collective.

        With `async_checkpoints` it is complete at the next step that finds all ranks' files written, before the next
        save, or at the end of the stage.
        """
        self.finish_saving()
        state = {"loader": self.loader.state_dict(), "guard": self.guard.state_dict()}
        keep = self.recipe.keep_checkpoints
        self.begun = start_checkpoint(self.engine, self.folder / "checkpoints", self.step, state, keep, shared=True)
        if not self.recipe.async_checkpoints:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if any, and mark it as complete; collective.

        Raises:
            CheckpointError: on all ranks, when a rank could not write a file.
        """
        begun, self.begun = self.begun, None
        if begun is not None:
            begun.finish()


def micro_batches(name: str, count: int, grid: ParallelDims) -> int:
    """Packs of a step on each data-parallel rank, of `count` in all.

    Raises:
        RecipeError: they do not divide.
    """
    if count % grid.data_size:
        ranks = grid.data_size
        raise RecipeError(
            f"{name}: the {count} packs of global_batch_size cannot be shared by {ranks} ranks evenly; give a multiple "
            f"of {ranks}"
        )
    return count // grid.data_size


def _move(batch: dict[str, Any]) -> dict[str, Any]:
    to = deep.device()
    return {k: v.to(to, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
