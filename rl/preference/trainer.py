"""Preference optimization: pairs → log-probabilities of both answers → MPO → metrics.

The pairs come from a file, or the start model makes them of its own answers. The start model's log-probabilities are
computed once, before the first update. A pair's prompt is read once for both answers (`rl.policy.prefix`).
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from keye.errors import CheckpointError, KeyeError, ManifestError, RecipeError, writing
from keye.processor.processor import Sample
from keye.slowfast.pixels import normalised
from rl.policy.model import freeze
from rl.policy.scoring import Group
from rl.preference.losses import MpoWeights, RewardShift, mpo_loss
from rl.preference.pairs import PairSet, idle_group, load_pairs, pair_group
from rl.preference.phase import (
    HeldOutQuestions,
    find_start,
    finished,
    heldout_questions,
    release,
    write_text,
)
from rl.preference.references import References, pair_scores
from rl.preference.self_pairs import sample_pairs
from rl.questions.heldout import Answered
from rl.questions.prompts import PromptStream
from rl.recipe import RlRecipe
from rl.run.agree import agree, from_first, gather
from rl.run.identity import check_ranks, claim, identity
from stages.data.items import PIXELS
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from stages.distributed.engine import build, device, gradient_norm, resolve_precision
from stages.distributed.parallel import sum_over_ranks
from stages.distributed.ranks import first_rank
from stages.distributed.weights import replace_model
from stages.metrics import MetricsLogger, duration, open_tracker
from stages.opening import open_processor
from stages.signals import REQUESTS, SignalRequests
from stages.typed_toml import to_toml

SUMS = (
    "loss", "preference", "quality", "generation", "chosen", "rejected", "right", "pairs", "tokens", "visual_tokens",
)  # fmt: skip
"""What is summed over the pairs of a step: losses, implicit rewards, pairs whose chosen answer has the higher one."""


class MpoTrainer:
    """Tunes the model of `run/<start>/model` and writes `run/mpo/{metrics.jsonl, eval.json, checkpoints, model}`.

    Raises:
        CheckpointError: the stage to start from has no model, or `run/mpo` is of another recipe, start model or pairs.
        ManifestError: no pairs or no held-out questions.
        RecipeError: the recipe does not fit the number of processes.
    """

    def __init__(self, recipe: RlRecipe, run: str | Path) -> None:
        self.recipe, self.config, self.run = recipe, recipe.mpo, Path(run)
        self.out = self.run / "mpo"
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        agree(self._check_world)
        agree(lambda: [open_tracker(name) for name in recipe.trackers])
        self.start = agree(lambda: find_start(self.run, self.config.start, "mpo"))
        self.found = self._claim()
        self.done = finished(self.out)
        self.step = 0
        self.shift = RewardShift()
        self.requests = SignalRequests()  # of this rank
        self.agreed: set[str] = set()  # requests of any rank after a step, the same on all
        first_rank(lambda: write_text(self.out / "recipe.toml", to_toml(recipe)))

    def _check_world(self) -> None:
        if self.config.batch_size < self.world:
            raise RecipeError(
                f"mpo.batch_size = {self.config.batch_size} is less than one pair for each of {self.world} processes: "
                f"set it to at least {self.world}, or start fewer processes"
            )

    def _claim(self) -> PairSet:
        """The pairs, made now if the recipe names none, after a check that a resumed phase has its own."""
        m, heldout = self.config, self.recipe.heldout
        self.heldout = HeldOutQuestions(
            self.out, heldout_questions(self.recipe, self.run, m.families), self.recipe, m.max_new_tokens
        )
        path = self.run / m.pairs if m.pairs else sample_pairs(self.recipe, self.run, self.start)
        found = agree(lambda: load_pairs(path))
        name = str(path.relative_to(self.run)) if path.is_relative_to(self.run) else str(path)
        digests = {name: found.digest, heldout.manifest: self.heldout.found.digest}
        mine = agree(lambda: identity(self.run, self.recipe, digests, "mpo"))
        check_ranks(mine)
        first_rank(lambda: claim(self.out, self.run, mine), OSError)
        self.identity = mine
        if found.rejected and self.rank == 0:
            first = next(iter(found.rejected.values()))
            print(f"{len(found.rejected)} lines of {path} are left out, the first because {first}", flush=True)
        return found

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Evaluate, train (from the newest checkpoint, if there is one), evaluate again; the content of `eval.json`.

        A finished phase returns its result. While it trains, SIGUSR1 requests a checkpoint, SIGTERM a checkpoint and
        the end.

        Raises:
            KeyeError: after SIGTERM; the step was finished and saved, and the same command resumes from it.
        """
        m = self.config
        if self.done is not None and self.done["steps"] == m.steps:
            return self.done
        before = self._before()
        self._build()
        self._refer()
        self._load()
        trackers, config = self.recipe.trackers, asdict(self.recipe)
        logger = MetricsLogger("mpo", m.steps, self.out, self.step, self.rank == 0, step_summary, trackers, config)
        with self.requests, logger:
            while self.step < m.steps:
                values = self.train_step()
                with writing(logger.file, "the metrics", CheckpointError):
                    logger.log(values)
                if self.step % m.checkpoint_every == 0 or self.step == m.steps or self.agreed:
                    self._save()
                if "stop" in self.agreed and self.step < m.steps:
                    raise KeyeError(f"mpo: stopped at step {self.step}; the same command resumes from it")
                self.requests.pending -= self.agreed
        replace_model(self.model, self.model, self.start, self.out / "model", self.processor.save_pretrained)
        self.heldout.rejected |= self.found.rejected | self.stream.rejected
        del self.engine, self.model
        release()
        written = agree(lambda: find_start(self.run, "mpo", "gspo"))
        after = self.heldout.measure("after", written, m.precision, m.decode_batch_size)
        return self.heldout.finish(before, after, steps=self.step, pairs=len(self.found.pairs))

    def _before(self) -> list[Answered]:
        """The start model's answers: from an earlier start of a phase that has checkpoints, or drawn now."""
        m, known = self.config, self.heldout.known("before")
        begun = from_first(lambda: bool(checkpoints(self.out / "checkpoints")))
        if begun and known is not None:
            return known
        return self.heldout.measure("before", self.start, m.precision, m.decode_batch_size)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on `batch_size` pairs over all ranks; metrics over all ranks."""
        began, m = time.perf_counter(), self.config
        drawn = self.stream.take(m.batch_size, range(self.rank, m.batch_size, self.world), gather)
        groups = agree(lambda: [self._group(int(prompt.id), sample) for prompt, sample in drawn])
        reference = [self.reference[int(prompt.id)] for prompt, _ in drawn]
        sums, lr = torch.zeros(len(SUMS), dtype=torch.float64, device=device()), self.engine.get_lr()[0]
        for begin in range(0, self.rounds * m.micro_pairs, m.micro_pairs):
            part = slice(begin, begin + m.micro_pairs)
            loss, parts = self._loss(groups[part], reference[part])
            sums += parts
            # DeepSpeed averages over ranks and rounds; the loss is the mean over all ranks' pairs.
            self.engine.backward(loss * (self.world * self.rounds / m.batch_size))
            self.engine.step()
        shift = self.shift.value
        self.shift.end_step()
        self.step += 1
        return self._metrics(sums, shift, lr, time.perf_counter() - began)

    def _loss(self, groups: list[Group], reference: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Summed loss of some pairs with gradient, and `SUMS`; a rank without pairs reads the idle one for nothing."""
        m = self.config
        log_probs, lengths = pair_scores(self.engine, groups or [self.idle])
        if not groups:
            self.shift.add(log_probs.new_zeros(0))
            return 0.0 * log_probs.sum(), torch.zeros(len(SUMS), dtype=torch.float64, device=log_probs.device)
        before = torch.from_numpy(np.stack(reference)).to(log_probs.device)
        weights = MpoWeights(m.preference, m.quality, m.generation)
        output = mpo_loss(log_probs, lengths, before, m.beta, self.shift.value, weights)
        self.shift.add(output.rewards)
        terms = [output.loss.detach(), output.preference, output.quality, output.generation, *output.rewards.unbind(1)]
        tokens = lengths.sum() + sum(len(group.sample) for group in groups)
        visual = tokens.new_tensor(sum(group.sample.visual_tokens for group in groups))
        right = (output.rewards[:, 0] > output.rewards[:, 1]).sum()
        counts = (right, right.new_tensor(len(groups)), tokens, visual)
        return output.loss.sum(), torch.stack([*(t.double().sum() for t in terms), *(c.double() for c in counts)])

    def _metrics(self, sums: Tensor, shift: float, lr: float, seconds: float) -> dict[str, Any]:
        requests = [float(name in self.requests.pending) for name in REQUESTS.values()]
        every = sum_over_ranks(torch.cat([sums, sums.new_tensor(requests)])).tolist()
        values = dict(zip(SUMS, every, strict=False))
        asked = zip(REQUESTS.values(), every[len(SUMS) :], strict=True)
        self.agreed = {name for name, count in asked if count}
        count = values["pairs"]
        return {
            "step": self.step,
            "loss": values["loss"] / count,
            **{key: values[key] / count for key in ("preference", "quality", "generation")},
            "reward_chosen": values["chosen"] / count,
            "reward_rejected": values["rejected"] / count,
            "margin": (values["chosen"] - values["rejected"]) / count,
            "reward_accuracy": values["right"] / count,
            "shift": shift,
            "lr": lr,
            "grad_norm": gradient_norm(self.engine),
            "tokens": int(values["tokens"]),
            "visual_tokens": int(values["visual_tokens"]),
            "tokens_per_second": values["tokens"] / seconds,
            "seconds": seconds,
            "epoch": self.stream.epoch,
            "rejected": len(self.found.rejected) + len(self.stream.rejected),
        }

    # --- state ------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """The model that is trained and its engine."""
        m = self.config
        self.processor = agree(lambda: open_processor("mpo", m, self.start))
        dtype = torch.bfloat16 if resolve_precision(m.precision) == "bf16" else torch.float32
        where = "meta" if m.zero == 3 else device()
        self.model = agree(lambda: self.start.build(dtype, where)).train()
        agree(lambda: freeze(self.model, m.freeze, "mpo"))
        agree(lambda: apply_memory_options(self.model, m.checkpointing, m.offload, m.mlp_tiles))
        largest = -(-m.batch_size // self.world)  # pairs of the first rank, which has most
        self.rounds = -(-largest // m.micro_pairs)
        self.engine = build(
            self.model, m, m.steps, zero=m.zero, accumulation=self.rounds, precision=m.precision,
            sources=self.start.sources(self.model),
        )  # fmt: skip
        self.idle = idle_group(self.processor)

    def _refer(self) -> None:
        """The start model's log-probabilities, and the stream of the pairs whose media can be read."""
        m, pairs = self.config, self.found.pairs
        settings = {"files": self.identity.files, "precision": resolve_precision(m.precision)}
        references = References(self.out / "reference", settings, len(pairs), m.micro_pairs)
        references.compute(self.engine, lambda place: self._group(place, self._sample(place)), self.idle)
        self.reference = agree(references.load)
        readable = np.isfinite(self.reference).all(1)
        for place in np.flatnonzero(~readable).tolist():
            why = references.rejected.get(place, f"it could not be read for {self.out / 'reference'}")
            self.found.rejected[pairs[place].prompt.where] = why
        if not readable.any():
            raise ManifestError(f"no pair can be read; the last one failed with: {why}")
        prompts = [pairs[place].prompt for place in np.flatnonzero(readable).tolist()]
        self.stream = PromptStream(prompts, self.processor, self.recipe.seed, m.cache_mb << 20)

    def _sample(self, place: int) -> Sample:
        """The encoded prompt of a pair, as the stream gives it."""
        prompt = self.found.pairs[place].prompt
        sample = self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)
        pixels = {name: getattr(sample, name) for name in PIXELS}
        return replace(sample, **{name: None if x is None else normalised(x) for name, x in pixels.items()})

    def _group(self, place: int, sample: Sample) -> Group:
        return pair_group(self.processor, self.found.pairs[place], sample)

    def _save(self) -> None:
        state = {"stream": self.stream.state_dict(), "shift": self.shift.state_dict()}
        folder, keep = self.out / "checkpoints", self.config.keep_checkpoints
        save_checkpoint(self.engine, folder, self.step, state, keep, shared=True)

    def _load(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        found = load_checkpoint(self.engine, self.out / "checkpoints")
        if found is not None:
            self.step, state = found
            self.stream.load_state_dict(state["stream"])
            self.shift.load_state_dict(state["shift"])
        if self.step > self.config.steps:
            raise CheckpointError(
                f"{self.out} has {self.step} steps already, but mpo.steps = {self.config.steps}; give at least as "
                f"many, remove {self.out} to train again, or use another --out"
            )


def step_summary(values: dict[str, Any]) -> str:
    """A step's metrics as a line."""
    return (
        f"loss {values['loss']:.3f}  margin {values['margin']:+.3f}  right {values['reward_accuracy']:.2f}  "
        f"{values['tokens_per_second']:,.0f} tokens/s  {duration(values['eta_seconds'])} left"
    )
