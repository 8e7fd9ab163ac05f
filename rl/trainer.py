"""The GSPO loop: questions → rollouts → rewards → advantages → mini-batches → metrics.

Every rank has its own questions, answers them with its own copy of the policy and takes part in the same number of
optimizer steps. Old log-probabilities are those of the training forward in float32, not of the sampler.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from keye.errors import CheckpointError, KeyeError, ManifestError, writing
from keye.files import write_atomically
from keye.processor.processor import Sample
from rl.blindness import BlindnessMonitor, without_marked
from rl.hints import HintStage
from rl.losses import group_advantages
from rl.policy.model import build_policy, complete
from rl.policy.scoring import Group, score
from rl.policy.update import PolicyUpdate, Update
from rl.questions.heldout import Answered, Best, ask, compare, read_answers, summary, write_answers
from rl.questions.prompts import Prompt, PromptStream, Taken, load_prompts
from rl.questions.sampling import Curriculum, Experience, accuracy_of, judged, replace_flat
from rl.recipe import RlRecipe, check_world, places_of
from rl.rewards import Earned, counted_advantages, rewards_from
from rl.rollout.build import build_rollout
from rl.rollout.engine import HELDOUT, ROLLOUT, number_of
from rl.rollout.served import ServedRollout
from rl.rollout.synchronise import PolicySync
from rl.run.agree import agree, from_first, gather
from rl.run.identity import check_ranks, claim, identity
from rl.run.metrics import rollout_values, step_metrics, step_summary
from rl.run.watch import warnings_of
from stages.distributed.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from stages.distributed.engine import build, resolve_precision
from stages.distributed.ranks import first_rank
from stages.distributed.weights import Start, open_start
from stages.metrics import MetricsLogger, open_tracker, read_metrics
from stages.opening import open_processor
from stages.signals import SignalRequests
from stages.typed_toml import to_toml


class GspoTrainer:
    """Tunes the model of `run/<start>/model` and writes `run/gspo/{metrics.jsonl, eval.json, checkpoints, model}`.

    Raises:
        CheckpointError: the stage to start from has no model, or `run/gspo` is of another recipe, model or manifest.
        ManifestError: no questions.
        RecipeError: the recipe does not fit the number of processes.
    """

    def __init__(self, recipe: RlRecipe, run: str | Path) -> None:
        self.recipe, self.run = recipe, Path(run)
        self.out = self.run / "gspo"
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        agree(lambda: check_world(recipe, self.world))
        agree(lambda: [open_tracker(name) for name in recipe.trackers])
        self.start = agree(self._open_start)
        self.rejected: dict[str, str] = {}
        prompts = self._claim()
        self.processor = agree(lambda: open_processor("gspo", recipe.gspo, self.start))
        self.policy = agree(lambda: build_policy(self.start, recipe.gspo, recipe.seed))
        self.model = self.policy.model
        self.engine = self._engine()
        dtype = torch.bfloat16 if resolve_precision(recipe.gspo.precision) == "bf16" else torch.float32
        # With LoRA the start model is the policy without LoRA's change.
        copied = recipe.gspo.kl and not recipe.gspo.lora_rank
        reference = agree(lambda: self.start.build(dtype, self.engine.device)) if copied else None
        self.update = PolicyUpdate(self.engine, recipe.gspo, reference)
        batch = recipe.gspo.decode_batch_size
        self.rollout = agree(lambda: build_rollout(recipe.rollout, self.model, self.processor, batch, self.rank))
        self.sync = None
        if isinstance(self.rollout, ServedRollout):
            folder = Path(recipe.rollout.folder or self.out / "policy")
            self.sync = PolicySync(self.rollout, folder, self.out, partial(self._save_policy, dtype=dtype))
        self.reward = agree(lambda: rewards_from(recipe.rewards, self.run))
        g = recipe.gspo
        self.curriculum = Curriculum(len(prompts), g.curriculum_floor, recipe.seed)
        self.stream = PromptStream(
            prompts, self.processor, recipe.seed, g.cache_mb << 20, g.max_prompt_tokens, self.curriculum.asks
        )
        self.blindness = agree(
            lambda: BlindnessMonitor(
                recipe.blindness, self.questions, self.processor, self._accuracies, self.rank, self.world
            )
        )
        self.best = Best()
        self.hints = HintStage(recipe.hints, self.processor, self._advantages, self._score)
        self.step = 0
        self.warned: set[str] = set()
        self.requests = SignalRequests()  # of this rank
        self.agreed: set[str] = set()  # requests of any rank after a step, the same on all
        first_rank(lambda: self._write(self.out / "recipe.toml", to_toml(recipe)))

    def _open_start(self) -> Start:
        """The directory of the model that is tuned."""
        name = self.recipe.gspo.start
        folder = self.run / name / "model"
        if (folder / "config.json").is_file():
            return open_start(folder)
        if (self.run / "model" / "config.json").is_file():
            raise CheckpointError(f"{self.run} is the folder of a stage: give the run's, --out {self.run.parent}")
        found = sorted(
            path.parents[1].name for path in self.run.glob("*/model/config.json") if path.parts[-3] != "gspo"
        )
        remedy = f"set gspo.start to one of {', '.join(found)}" if found else "link a model there or pre-train"
        raise CheckpointError(f"{folder} has no model: {remedy}")

    def _claim(self) -> list[Prompt]:
        """The questions to train on, after a check that all ranks read the same files and a resumed run its own."""
        g, heldout = self.recipe.gspo, self.recipe.heldout
        found = agree(lambda: without_marked(load_prompts(self.run / g.manifest, g.families), self.recipe.blindness))
        evaluated = agree(lambda: load_prompts(self.run / heldout.manifest, g.families, unique=True))
        digests = {g.manifest: found.digest, heldout.manifest: evaluated.digest}
        mine = agree(lambda: identity(self.run, self.recipe, digests))
        check_ranks(mine)
        first_rank(lambda: claim(self.out, self.run, mine), OSError)
        self.questions = self._limited(evaluated.prompts)
        self.rejected = found.rejected | evaluated.rejected
        if self.rank == 0:
            for remark in [*found.remarks, *evaluated.remarks]:
                print(remark, flush=True)
        return found.prompts

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Evaluate, train (from the newest checkpoint, if there is one), evaluate again; the content of `eval.json`.

        While it trains, SIGUSR1 requests a checkpoint, SIGTERM a checkpoint and the end.

        Raises:
            KeyeError: after SIGTERM; the step was finished and saved, and the same command resumes from it. Or the
                guard against blindness stops the run, which does not resume.
        """
        g = self.recipe.gspo
        before = self._before()
        self._load()
        if self.blindness.stopped:
            raise KeyeError(self.blindness.reason(self.step))
        trackers, config = self.recipe.trackers, asdict(self.recipe)
        logger = MetricsLogger("gspo", g.steps, self.out, self.step, self.rank == 0, step_summary, trackers, config)
        with self.requests, logger:
            while self.step < g.steps:
                self._log(logger, self.train_step() | self._probes())
                blind = self.blindness.stopped
                if self.step % g.checkpoint_every == 0 or self.step == g.steps or self.agreed or blind:
                    folder, state = self.out / "checkpoints", self._state()
                    save_checkpoint(self.engine, folder, self.step, state, g.keep_checkpoints, shared=True)
                if blind:
                    raise KeyeError(self.blindness.reason(self.step))
                if "stop" in self.agreed and self.step < g.steps:
                    raise KeyeError(f"gspo: stopped at step {self.step}; the same command resumes from it")
                self.requests.pending -= self.agreed
        after = self._measure("after")
        if self.recipe.heldout.every:
            self._keep_best(after)
        result = compare(before, after) | {"seed": self.recipe.seed} | self._summary()
        self._save_policy(self.out / "model")
        if self.sync is not None:
            self.sync.close()
        first_rank(lambda: self._write(self.out / "eval.json", json.dumps(result, indent=1)))
        return result

    def train_step(self) -> dict[str, Any]:
        """One rollout batch and its optimizer steps; metrics over all ranks."""
        began = time.perf_counter()
        with self._sampling():
            experience, replaced = self._experience()
        rolled = time.perf_counter()
        updates = self._update(experience)
        self.step += 1
        seconds = {"rollout": rolled - began, "update": time.perf_counter() - rolled}
        local = rollout_values([experience, *replaced]) | {
            "updates": [asdict(update) for update in updates],
            "rejected": len(self.rejected | self.stream.rejected),
            "requests": set(self.requests.pending),
        }
        ranks = gather(local)
        self.agreed = set().union(*(rank["requests"] for rank in ranks))
        metrics = step_metrics(self.step, ranks, seconds, self.recipe.blindness)
        return metrics | self.hints.metrics | {"lr": self.engine.get_lr()[0], "epoch": self.stream.epoch}

    def _experience(self) -> tuple[Experience, list[Experience]]:
        """Draw this rank's prompts, answer them, judge the answers; also the groups that others have replaced."""
        g = self.recipe.gspo
        places = places_of(self.rank, self.world, g.prompts, g.mini_batches)
        ends = [0, *accumulate(map(len, places))]
        parts = [slice(begin, end) for begin, end in pairwise(ends)]
        own = list(chain.from_iterable(places))
        self.stream.begin_step()
        drawn = self.stream.take(g.prompts, own, gather)
        first = agree(lambda: self._answer(drawn, parts))
        groups, advantages = self.hints.apply(
            first.prompts, first.groups, first.earned, first.advantages, self._rolled,
            partial(self.blindness.factor, first),
        )  # fmt: skip
        first = replace(first, groups=groups, advantages=advantages)
        found = replace_flat(first, own, g.extra_prompts, self.stream, lambda more: self._answer(more, []))
        self.curriculum.observe_step([found[0], *found[1]])
        return found

    def _answer(self, drawn: list[Taken], parts: list[slice]) -> Experience:
        groups, earned = self._rolled(drawn)
        prompts = [prompt for prompt, _ in drawn]
        return self.blindness.guarded(Experience(prompts, groups, earned, *self._advantages(earned), parts))

    def _rolled(self, drawn: list[Taken]) -> tuple[list[Group], list[list[Earned]]]:
        """A group of answers to each question, and what they earned."""
        g = self.recipe.gspo
        groups = self._sample(drawn, g.group_size, ROLLOUT)
        return groups, g.truncation.treated(judged(self.reward, drawn, groups), groups)

    def _advantages(self, earned: list[list[Earned]]) -> tuple[Tensor, Tensor]:
        """Rewards and advantages [P, G] of groups; P is 0 where a rank has no flat group to replace."""
        if not earned:
            return (none := torch.zeros(0, self.recipe.gspo.group_size)), none
        return counted_advantages(earned, lambda given: group_advantages(given, self.recipe.gspo.standardise))

    def _score(self, group: Group) -> Tensor:
        """Log-probabilities [T] of a group's answers under the policy with complete weights (`rl.policy.model`)."""
        return score(self.model, [group], self.recipe.gspo.temperature).log_probs

    def _sample(self, asked: list[Taken], answers: int, purpose: int) -> list[Group]:
        """Answers to each question; they follow from the seed, the step, the question's id and its repeats."""
        g, begin = self.recipe.gspo, (self.recipe.seed, purpose, self.step)
        keys = [(*begin, number_of(prompt.id), *([prompt.repeat] if prompt.repeat else ())) for prompt, _ in asked]
        samples = [sample for _, sample in asked]
        return self.rollout.generate(samples, answers, g.temperature, g.max_new_tokens, keys)

    def _accuracies(self, asked: list[Taken], samples: int) -> list[float]:
        """The mean accuracy of `samples` answers to each question, sampled as in training."""
        groups = self._sample(asked, samples, HELDOUT)
        return [accuracy_of(group) for group in judged(self.reward, asked, groups)]

    def _update(self, experience: Experience) -> list[Update]:
        """The optimizer steps of a step, one for each mini-batch."""
        return self.update.run(experience.groups, experience.advantages, experience.parts)

    # --- held-out questions -----------------------------------------------------------------------------------------

    def _limited(self, questions: list[Prompt]) -> list[Prompt]:
        """At most `heldout.limit` questions of each family."""
        seen: Counter[str] = Counter()
        chosen = []
        for prompt in questions:
            seen[prompt.family] += 1
            if seen[prompt.family] <= self.recipe.heldout.limit:
                chosen.append(prompt)
        return chosen

    def _before(self) -> list[Answered]:
        """The start model's answers: from an earlier evaluation, or evaluated now, before a checkpoint is loaded."""
        path, kept = self.out / "before.jsonl", self.out / "checkpoints"
        rows = from_first(lambda: read_answers(path, self.questions) if checkpoints(kept) else None)
        return self._measure("before") if rows is None else rows

    def _probes(self) -> dict[str, Any]:
        """The metrics of what is measured between steps: blindness, and the held-out questions with the best model."""
        began, every = time.perf_counter(), self.recipe.heldout.every
        probes = self.recipe.blindness.every and self.step % self.recipe.blindness.every == 0
        with self._sampling() if probes else nullcontext():
            found: dict[str, Any] = self.blindness.probe(self.step)
        if every and self.step % every == 0 and self.step < self.recipe.gspo.steps:
            rows = self._measure(f"heldout/step-{self.step}")
            found |= {f"heldout/{name}": value for name, value in summary(rows).items() if name != "families"}
            self._keep_best(rows)
        return found | ({"seconds_probes": time.perf_counter() - began} if found else {})

    def _keep_best(self, rows: list[Answered]) -> None:
        """Write the model to `model-best` when its mean held-out reward is the highest so far; collective."""
        if not from_first(lambda: self.best.beaten_by(rows, self.out, self.questions)):
            return
        self.best = Best(self.step, fmean(one.sampled for one in rows))
        self._save_policy(self.out / "model-best.new")  # the former one stays until this one is complete
        first_rank(lambda: self.best.write(self.out, rows), OSError)

    def _measure(self, name: str) -> list[Answered]:
        """All ranks' answers to the held-out questions, written to `<name>.jsonl`."""
        wanted, g = self.recipe.heldout, self.recipe.gspo
        mine = self.questions[self.rank :: self.world]
        with self._progress() as bar, self._sampling():
            task = bar.add_task(f"held-out reward {name}", total=len(mine) * self.world)
            answered, rejected = agree(
                lambda: ask(
                    self.rollout,
                    mine,
                    self._encode,
                    self.reward,
                    wanted.samples,
                    wanted.temperature,
                    g.max_new_tokens,
                    lambda count: bar.advance(task, count * self.world),
                    self.recipe.seed,
                )  # fmt: skip
            )
        rows = [one for rank in gather(answered) for one in rank]
        for rank in gather(rejected):
            self.rejected |= rank
        if not rows:
            raise ManifestError(f"no question of {self.run / wanted.manifest} can be read: give clips that decode")
        first_rank(lambda: write_answers(self.out / f"{name}.jsonl", rows), OSError)
        return rows

    def _encode(self, prompt: Prompt) -> Sample:
        return self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """The weights for rollouts: complete in this process, or loaded by the servers. Collective at its begin."""
        if self.sync is not None:
            self.sync(self.step)
        # Hinted answers to the original question are scored by the model of this process.
        here = self.sync is None or self.recipe.hints.update == "original"
        with complete(self.engine) if here else nullcontext():
            yield

    def _save_policy(self, out: Path, dtype: torch.dtype = torch.float32) -> None:
        self.policy.save(out, self.processor.save_pretrained, dtype)

    # --- state ------------------------------------------------------------------------------------------------------

    def _engine(self) -> Any:
        """The DeepSpeed engine around the model."""
        g = self.recipe.gspo
        return build(
            self.model, g, g.steps * g.mini_batches, zero=g.zero, precision=g.precision, sources=self.policy.sources,
            offload_optimizer=g.offload_optimizer,
        )  # fmt: skip

    def _state(self) -> dict[str, Any]:
        """What a checkpoint has besides the engine: the same on every rank."""
        return self.stream.state_dict() | {
            "curriculum": self.curriculum.state_dict(),
            "blindness": self.blindness.state_dict(),
            "best": asdict(self.best),
        }

    def _load(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        found = load_checkpoint(self.engine, self.out / "checkpoints")
        if found is not None:
            self.step, state = found
            self.stream.load_state_dict(state)
            self.curriculum.load_state_dict(state.get("curriculum", {}))
            self.blindness.load_state_dict(state.get("blindness", {}))
            saved = Best(**state.get("best", {}))
            self.best = from_first(lambda: Best.read(self.out, self.step) or saved)
        if self.step > self.recipe.gspo.steps:
            raise CheckpointError(
                f"{self.out} has {self.step} steps already, but gspo.steps = {self.recipe.gspo.steps}; "
                f"give at least as many, remove {self.out} to train again, or use another --out"
            )

    def _summary(self) -> dict[str, Any]:
        """The prompts and lines that were left out, and the number of steps without any advantage."""
        rows = from_first(lambda: read_metrics(self.out / "metrics.jsonl", self.step))
        constant = sum(row.get("informative") == 0 for row in rows)
        return {
            "steps": self.step,
            "steps_without_advantage": constant,
            "rejected": self.rejected | self.stream.rejected,
            **({"best": asdict(self.best)} if self.best.step else {}),
        }

    # --- logging ---------------------------------------------------------------------------------------------------

    def _log(self, logger: MetricsLogger, metrics: dict[str, Any]) -> None:
        found = metrics.pop("failures") | warnings_of(metrics, self.recipe.gspo.max_new_tokens)
        with writing(logger.file, "the metrics", CheckpointError):
            logger.log(metrics | ({"warnings": list(found.values())} if found else {}))
        for kind, text in found.items():
            if kind not in self.warned:  # printed once while it lasts
                logger.note(text)
        self.warned = set(found)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with writing(path, kind=CheckpointError):
            write_atomically(path, text + "\n")

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), disable=self.rank > 0)
