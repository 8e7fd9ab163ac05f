"""Train a reward model on pairs: Bradley-Terry loss, checkpoints, and its accuracy on pairs that are held out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keye.errors import CheckpointError, KeyeError, RecipeError, writing
from keye.files import write_atomically
from keye.processor.processor import KeyeProcessor
from rl.policy.scoring import Group
from rl.preference.pairs import Pair, idle_group, load_pairs, pair_group
from rl.preference.reward_model import PARTS, RewardModel, RewardRecord, pair_loss, write_head
from rl.questions.prompts import PromptStream
from rl.run.agree import agree, gather
from rl.run.identity import model_files
from stages.distributed.checkpoints import load_checkpoint, save_checkpoint
from stages.distributed.engine import build, device, gradient_norm, master_weight, resolve_precision
from stages.distributed.parallel import sum_over_ranks
from stages.distributed.ranks import first_rank
from stages.distributed.weights import open_start, replace_model
from stages.metrics import MetricsLogger, duration
from stages.optimizer import OptimizerConfig
from stages.signals import REQUESTS, SignalRequests
from stages.typed_toml import requirement

NOT_TRAINED = ("steps", "checkpoint_every", "keep_checkpoints", "cache_mb", "micro_pairs")
"""Settings that a resumed training may change, see `settings_of`."""


@dataclass(frozen=True, kw_only=True)
class RewardTraining(OptimizerConfig):
    """Settings of the training of a reward model."""

    steps: int
    """Optimizer steps."""

    schedule: str = "constant"
    """Learning rate over the steps: "cosine" (to zero) or "constant"."""

    trained: str = "full"
    """Part that trains: "full" (the whole model) or "head" (the scalar head alone)."""

    heldout: float = 0.1
    """Share of the pairs that are not trained on, at the end of the file."""

    batch_size: int = 32
    """Pairs of a step over all processes."""

    micro_pairs: int = 4
    """Pairs of a process in one forward pass."""

    zero: int = 2
    """Stage of DeepSpeed ZeRO: 0, 1 or 2."""

    precision: str = "auto"
    """Numbers: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16"."""

    cache_mb: int = 1024
    """Host memory in MB that a process may use for encoded prompts."""

    checkpoint_every: int = 50
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints that are kept."""

    seed: int = 0
    """Seed of the order of the pairs."""

    def validate(self) -> None:
        """Refuse impossible values.

        Raises:
            RecipeError: names the option.
        """
        need = requirement("reward model")
        self.check("--set", need)
        need(self.trained in ("full", "head"), '--train must be "full" or "head"')
        need(0 < self.heldout < 1, "--heldout must be above 0 and below 1, a share of the pairs")
        need(self.zero in (0, 1, 2), "--zero must be 0, 1 or 2")
        for key in ("steps", "batch_size", "micro_pairs", "checkpoint_every", "keep_checkpoints"):
            need(getattr(self, key) >= 1, f"--{key.replace('_', '-')} must be at least 1")


def settings_of(config: RewardTraining) -> dict[str, Any]:
    """The settings that a resumed training may not change; `steps` is one where the learning rate depends on it."""
    may_change = set(NOT_TRAINED) - (set() if config.schedule == "constant" else {"steps"})
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in may_change}


class RewardTrainer:
    """Trains a reward model from the model directory `start` on the pairs of a file, into the directory `out`.

    `out` is a Hugging Face directory with the head (`RewardScorer` reads it); `out/training` has metrics and
    checkpoints.

    Raises:
        CheckpointError: no such model, or `out` is of another model, pairs or settings.
        ManifestError: no pairs. RecipeError: too few pairs, or settings that do not fit the number of processes.
    """

    def __init__(self, config: RewardTraining, start: str | Path, pairs: str | Path, out: str | Path) -> None:
        config.validate()
        self.config, self.out = config, Path(out)
        self.folder = self.out.with_name(self.out.name + ".training")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.start = agree(lambda: open_start(start))
        found = agree(lambda: load_pairs(pairs))
        self.pairs, self.rejected = found.pairs, found.rejected
        self.heldout = max(1, round(config.heldout * len(self.pairs)))
        agree(self._check)
        settings = settings_of(config)
        settings |= {"pairs": found.digest, "start": agree(lambda: model_files(self.start.directory))}
        first_rank(lambda: self._claim(json.loads(json.dumps(settings))), OSError)
        self.processor = agree(lambda: KeyeProcessor.from_pretrained(self.start.directory))
        self._build()
        prompts = [pair.prompt for pair in self.pairs[: -self.heldout]]
        self.stream = PromptStream(prompts, self.processor, config.seed, config.cache_mb << 20)
        self.step = 0
        self.moments = torch.zeros(3, dtype=torch.float64)  # count, sum and sum of squares of the last step's scores
        self.requests = SignalRequests()
        self.agreed: set[str] = set()

    def _check(self) -> None:
        c, count = self.config, len(self.pairs) - self.heldout
        if count < 1:
            raise RecipeError(f"{len(self.pairs)} pairs are too few to hold out {self.heldout}; give more pairs")
        if c.batch_size < self.world:
            raise RecipeError(f"--batch-size {c.batch_size} must be at least {self.world}, one pair for each process")

    def _claim(self, settings: dict[str, Any]) -> None:
        """Record what this training depends on; compare it with the record of an earlier start."""
        record = self.folder / "settings.json"
        with writing(self.folder, "the training", CheckpointError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                write_atomically(record, json.dumps(settings, indent=1) + "\n")
        found = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key in sorted(settings.keys() | found.keys()) if settings.get(key) != found.get(key)]
        if changed:
            raise CheckpointError(
                f"{self.folder} was begun with another {changed[0]}; remove it, or give another --out"
            )

    def _build(self) -> None:
        c = self.config
        dtype = torch.bfloat16 if resolve_precision(c.precision) == "bf16" else torch.float32
        self.keye = agree(lambda: self.start.build(dtype, device(), PARTS))
        self.model = RewardModel(self.keye).to(device()).train()
        self.model.backbone.requires_grad_(c.trained == "full")
        self.rounds = math.ceil(math.ceil(c.batch_size / self.world) / c.micro_pairs)
        known = {id(p) for p in self.model.parameters()}
        sources = {p: stored for p, stored in self.start.sources(self.keye).items() if id(p) in known}
        self.engine = build(
            self.model, c, c.steps, zero=c.zero, accumulation=self.rounds, precision=c.precision, sources=sources
        )
        self.idle = idle_group(self.processor)

    def train(self) -> RewardRecord:
        """Train (from the newest checkpoint, if there is one), measure, and write the model.

        Raises:
            KeyeError: after SIGTERM; the step was finished and saved, and the same command resumes from it.
        """
        c = self.config
        loaded = load_checkpoint(self.engine, self.folder / "checkpoints")
        if loaded is not None:
            self.step, state = loaded
            self.stream.load_state_dict(state["stream"])
            self.moments = torch.tensor(state["moments"], dtype=torch.float64)
        logger = MetricsLogger("reward", c.steps, self.folder, self.step, self.rank == 0, step_summary)
        with self.requests, logger:
            while self.step < c.steps:
                values = self.train_step()
                with writing(logger.file, "the metrics", CheckpointError):
                    logger.log(values)
                if self.step % c.checkpoint_every == 0 or self.step == c.steps or self.agreed:
                    state = {"stream": self.stream.state_dict(), "moments": self.moments.tolist()}
                    save_checkpoint(
                        self.engine, self.folder / "checkpoints", self.step, state, c.keep_checkpoints, shared=True
                    )
                if "stop" in self.agreed and self.step < c.steps:
                    raise KeyeError(f"reward: stopped at step {self.step}; the same command resumes from it")
                self.requests.pending -= self.agreed
        return self._write(self.accuracy())

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on `batch_size` pairs over all ranks; metrics over all ranks."""
        began, c = time.perf_counter(), self.config
        drawn = self.stream.take(c.batch_size, range(self.rank, c.batch_size, self.world), gather)
        groups = agree(lambda: [pair_group(self.processor, self.pairs[int(p.id)], sample) for p, sample in drawn])
        sums, lr = torch.zeros(5, dtype=torch.float64, device=device()), self.engine.get_lr()[0]
        for begin in range(0, self.rounds * c.micro_pairs, c.micro_pairs):
            part = groups[begin : begin + c.micro_pairs]
            scores = self.engine(part or [self.idle]).view(-1, 2)
            losses = pair_loss(scores) if part else 0.0 * scores.sum(1)
            if part:
                sums += _counts(scores.detach(), losses.detach())
            # DeepSpeed averages over ranks and rounds; the loss is the mean over all ranks' pairs.
            self.engine.backward(losses.sum() * (self.world * self.rounds / c.batch_size))
            self.engine.step()
        self.step += 1
        requests = [float(name in self.requests.pending) for name in REQUESTS.values()]
        every = sum_over_ranks(torch.cat([sums, sums.new_tensor(requests)])).tolist()
        self.agreed = {name for name, n in zip(REQUESTS.values(), every[5:], strict=True) if n}
        count, loss, right, total, squares = every[:5]
        self.moments = torch.tensor([2 * count, total, squares], dtype=torch.float64)
        seconds = time.perf_counter() - began
        return {
            "step": self.step,
            "loss": loss / count,
            "accuracy": right / count,
            "lr": lr,
            "grad_norm": gradient_norm(self.engine),
            "seconds": seconds,
            "epoch": self.stream.epoch,
            "rejected": len(self.rejected) + len(self.stream.rejected),
        }

    @torch.no_grad()
    def accuracy(self) -> tuple[float | None, int]:
        """Share of held-out pairs whose chosen answer has the higher score, and their number; collective.

        Equal scores count as half. A pair whose media cannot be read is left out.
        """
        mine = list(range(len(self.pairs) - self.heldout, len(self.pairs)))[self.rank :: self.world]
        sums = torch.zeros(2, dtype=torch.float64, device=device())
        for turn in range(-(-self.heldout // self.world)):
            group = agree(lambda turn=turn: self._readable(self.pairs[mine[turn]]) if turn < len(mine) else None)
            scores = self.engine([group or self.idle])
            if group is not None:
                sums += torch.stack([(0.5 + 0.5 * (scores[0] - scores[1]).sign()).double(), sums.new_ones(())])
        right, count = sum_over_ranks(sums).tolist()
        return (right / count if count else None), int(count)

    def _readable(self, pair: Pair) -> Group | None:
        try:
            sample = self.processor.sample(pair.prompt.messages, pair.prompt.base_dir, add_generation_prompt=True)
        except KeyeError:
            return None
        return pair_group(self.processor, pair, sample)

    def _write(self, measured: tuple[float | None, int]) -> RewardRecord:
        """Write the directory of the reward model; collective."""
        count, total, squares = self.moments.tolist()
        mean = total / max(count, 1.0)
        deviation = math.sqrt(max(squares / max(count, 1.0) - mean * mean, 0.0))
        trained = len(self.pairs) - self.heldout
        record = RewardRecord(
            str(self.start.directory), self.config.trained, trained, measured[1], measured[0], mean, deviation
        )
        head = master_weight(self.model.head.weight).cpu()

        def extras(part: Path) -> None:
            self.processor.save_pretrained(part)
            write_head(part, head, record)

        replace_model(self.keye, self.model, self.start, self.out, extras)
        return record


def _counts(scores: Tensor, losses: Tensor) -> Tensor:
    """float64 [5] of scores [P, 2]: pairs, summed loss, right ones, and sum and squares of all scores."""
    values = scores.double()
    right = (values[:, 0] > values[:, 1]).sum()
    return torch.stack([right.new_tensor(len(values)), losses.double().sum(), right, values.sum(), (values**2).sum()])


def step_summary(values: dict[str, Any]) -> str:
    """A step's metrics as a line."""
    return f"loss {values['loss']:.3f}  right {values['accuracy']:.2f}  {duration(values['eta_seconds'])} left"
