"""The GSPO loop: questions → rollouts → rewards → advantages → mini-batches → metrics.

Every rank owns other questions, answers them with its own copy of the policy and takes part in the same number of
optimizer steps. Old log-probabilities are those of the training forward in float32, not of the sampler.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from keye.errors import CheckpointError, KeyeError, ManifestError, RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.prompt.processor import KeyeProcessor, Sample
from rl.agree import agree, gather
from rl.gspo import group_advantages, gspo_loss
from rl.heldout import Answered, ask, compare
from rl.identity import claim
from rl.metrics import step_metrics
from rl.policy import Group, Score, score
from rl.prompts import Prompt, PromptStream, Taken, load_prompts
from rl.recipe import RlRecipe, check_world, places_of
from rl.rewards import Earned, Judgement, rewards_from
from rl.rollout import InProcessRollout
from stages.checkpoints import first_rank, load_checkpoint, save_checkpoint
from stages.engine import build
from stages.typed_toml import to_toml


@dataclass(frozen=True)
class Experience:
    """One rank's share of a step: P prompts with G answers each. rewards, advantages: float32 [P, G].

    parts: the places of each mini-batch's groups.
    """

    prompts: list[Prompt]
    groups: list[Group]
    earned: list[list[Earned]]
    rewards: Tensor
    advantages: Tensor
    parts: list[slice]


@dataclass(frozen=True)
class Update:
    """One mini-batch on one rank: what it scored, the ratios [S] and which were clipped, and the engine's numbers."""

    loss: float
    entropy: list[float]
    ratio: list[float]
    clipped: list[bool]
    grad_norm: float


class GspoTrainer:
    """Tunes the model of `run/<start>/model` and leaves `run/gspo/{metrics.jsonl, eval.json, checkpoints, model}`.

    Raises:
        CheckpointError: the stage to start from has left no model, or `run/gspo` holds the training of another recipe
            or start model.
        ManifestError: no questions to ask.
        RecipeError: the recipe does not fit the number of processes.
    """

    def __init__(self, recipe: RlRecipe, run: str | Path) -> None:
        self.recipe, self.run = recipe, Path(run)
        self.out = self.run / "gspo"
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        check_world(recipe, self.world)
        start = self.run / recipe.gspo.start / "model"
        if not (start / "config.json").is_file():
            raise CheckpointError(f"{start} holds no model: run scripts/pretrain.py with --run {run} first")
        first_rank(lambda: claim(self.out, recipe, start))
        self.processor = KeyeProcessor.from_pretrained(start)
        self.model = KeyeForConditionalGeneration.from_pretrained(start)
        self.engine = self._engine()
        self.generator = torch.Generator(self.engine.device)
        self.rollout = InProcessRollout(self.model, self.processor, self.generator, recipe.gspo.decode_batch)
        self.reward = rewards_from(recipe.rewards)
        found = agree(lambda: load_prompts(self.run / recipe.gspo.manifest, recipe.gspo.families))
        self.stream = PromptStream(found.prompts, self.processor, recipe.seed)
        self.stream.rejected |= found.rejected
        self.step = 0
        if self.rank == 0:
            self._write(self.out / "recipe.toml", to_toml(recipe))

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Measure, train (from the last checkpoint, if there is one), measure again; what `eval.json` holds."""
        from torch.utils.tensorboard import SummaryWriter

        g = self.recipe.gspo
        questions = self._questions()
        self._load()
        before = self._measure(questions, "before")
        writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step) if self.rank == 0 else None
        with self._progress() as bar:
            task = bar.add_task("gspo", total=g.steps, completed=self.step, said="")
            while self.step < g.steps:
                metrics = self.train_step()
                self._log(metrics, writer)
                said = f"reward {metrics['reward_mean']:.3f} · {metrics['tokens_per_second']:.0f} tokens/s"
                bar.update(task, advance=1, said=said)
                if self.step % g.checkpoint_every == 0 or self.step == g.steps:
                    state = self.stream.state_dict()
                    save_checkpoint(self.engine, self.out / "checkpoints", self.step, state, shared=True)
        if writer:
            writer.close()
        after = self._measure(questions, "after")
        result = compare(before, after) | {"seed": self.recipe.seed, "rejected": self._rejected()}
        if self.rank == 0:
            self._write(self.out / "eval.json", json.dumps(result, indent=1))
            self.model.save_pretrained(self.out / "model")
            self.processor.save_pretrained(self.out / "model")
        dist.barrier()
        return result

    def train_step(self) -> dict[str, Any]:
        """One rollout batch and its optimizer steps; metrics over all ranks."""
        began = time.perf_counter()
        experience = self._experience()
        rolled = time.perf_counter()
        chosen = [self._informative(experience, part) for part in experience.parts]
        # Scored before the first update: this is the policy that all mini-batches are compared with.
        with torch.no_grad():
            old = [score(self.engine, [experience.groups[i] for i in places], self._temperature) for places in chosen]
        updates = [self._update(experience, places, o) for places, o in zip(chosen, old, strict=True)]
        self.step += 1
        seconds = {"rollout": rolled - began, "update": time.perf_counter() - rolled}
        local = {
            "families": [prompt.family for prompt in experience.prompts],
            "earned": [[asdict(e) for e in group] for group in experience.earned],
            "lengths": [len(c) for group in experience.groups for c in group.completions],
            "finished": [f for group in experience.groups for f in group.finished],
            "visual_tokens": sum(group.sample.visual_tokens for group in experience.groups),
            "prompt_tokens": sum(len(group.sample) for group in experience.groups),
            "updates": [asdict(update) for update in updates],
            "rejected": len(self.stream.rejected),
        }
        metrics = step_metrics(self.step, gather(local), seconds)
        return metrics | {"lr": self.engine.get_lr()[0], "epoch": self.stream.epoch}

    @property
    def _temperature(self) -> float:
        return self.recipe.gspo.temperature

    def _experience(self) -> Experience:
        """Draw this rank's prompts, answer them, judge the answers."""
        g = self.recipe.gspo
        places = places_of(self.rank, self.world, g.prompts, g.mini_batches)
        ends = [0, *accumulate(map(len, places))]
        parts = [slice(begin, end) for begin, end in pairwise(ends)]
        drawn = self.stream.take(g.prompts, chain.from_iterable(places), gather)
        self._seed("rollout", self.step)
        return agree(lambda: self._answer(drawn, parts))

    def _answer(self, drawn: list[Taken], parts: list[slice]) -> Experience:
        g = self.recipe.gspo
        groups = self.rollout.generate([sample for _, sample in drawn], g.group, g.temperature, g.max_new_tokens)
        earned = [
            [self.reward(Judgement(prompt, t, f)) for t, f in zip(group.texts, group.finished, strict=True)]
            for (prompt, _), group in zip(drawn, groups, strict=True)
        ]
        rewards = torch.tensor([[e.total for e in group] for group in earned])
        return Experience([prompt for prompt, _ in drawn], groups, earned, rewards, group_advantages(rewards), parts)

    @staticmethod
    def _informative(experience: Experience, part: slice) -> list[int]:
        """The groups of a mini-batch whose rewards differ; one group at least, since every rank must take part."""
        places = range(len(experience.groups))[part]
        return [i for i in places if experience.advantages[i].any()] or [places[0]]

    def _update(self, experience: Experience, places: list[int], old: Score) -> Update:
        """One optimizer step on the groups at `places`."""
        g = self.recipe.gspo
        new = score(self.engine, [experience.groups[i] for i in places], g.temperature)
        advantages = experience.advantages[places].flatten().to(new.log_probs.device)
        # DeepSpeed averages gradients over the ranks; the loss is a sum over all ranks' sequences.
        sequences = g.prompts * g.group / g.mini_batches
        output = gspo_loss(
            new.log_probs, old.log_probs, new.owner, advantages, sequences / self.world, g.epsilon_low, g.epsilon_high
        )
        self.engine.backward(output.loss)
        self.engine.step()
        return Update(
            output.loss.item(),
            new.entropy.tolist(),
            output.ratio.tolist(),
            output.clipped.tolist(),
            float(self.engine.get_global_grad_norm() or 0.0),
        )

    def _seed(self, purpose: str, number: int) -> None:
        """The sampler's randomness is a function of (seed, purpose, number, rank), so a resumed run draws the same."""
        kind = {"rollout": 0, "heldout": 1}[purpose]
        self.generator.manual_seed(((self.recipe.seed * 2 + kind) * 1_000_003 + number) * 4096 + self.rank)

    # --- held-out questions -----------------------------------------------------------------------------------------

    def _questions(self) -> list[tuple[Prompt, Sample]]:
        """This rank's share of the held-out questions, encoded; at most `limit` of each family over all ranks."""
        wanted, seen = self.recipe.heldout, {}
        chosen = []
        for prompt in agree(lambda: load_prompts(self.run / wanted.manifest, self.recipe.gspo.families)).prompts:
            seen[prompt.family] = seen.get(prompt.family, 0) + 1
            if seen[prompt.family] <= wanted.limit:
                chosen.append(prompt)
        questions = []
        for prompt in chosen[self.rank :: self.world]:
            try:
                sample = self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)
                questions.append((prompt, sample))
            except KeyeError as error:
                self.stream.rejected[prompt.id] = str(error)
        if not any(gather(len(questions))):
            raise ManifestError(f"no question of {self.run / wanted.manifest} can be read: give clips that decode")
        return questions

    def _measure(self, questions: list[tuple[Prompt, Sample]], name: str) -> list[Answered]:
        """All ranks' answers to the held-out questions; what was measured before is kept in `<name>.jsonl`."""
        path = self.out / f"{name}.jsonl"
        if name == "before" and self.step and path.is_file():
            return [Answered(**json.loads(line)) for line in path.read_text().splitlines()]
        wanted, g = self.recipe.heldout, self.recipe.gspo
        self._seed("heldout", 0)
        with self._progress() as bar:
            task = bar.add_task(f"held-out reward {name}", total=len(questions) * self.world, said="")
            answered = ask(
                self.rollout, questions, self.reward, wanted.samples, wanted.temperature, g.max_new_tokens,
                lambda count: bar.advance(task, count * self.world),
            )  # fmt: skip
        rows = [one for rank in gather(answered) for one in rank]
        if self.rank == 0:
            self._write(path, "\n".join(json.dumps(asdict(row)) for row in rows))
        return rows

    # --- state ------------------------------------------------------------------------------------------------------

    def _engine(self) -> Any:
        """The DeepSpeed engine around the model, without what the recipe freezes."""
        g = self.recipe.gspo
        backbone = self.model.base_model
        for name in g.freeze:
            try:
                (self.model if name.startswith("lm_head") else backbone).get_submodule(name).requires_grad_(False)
            except AttributeError:
                parts = ", ".join([*(child for child, _ in backbone.named_children()), "lm_head"])
                raise RecipeError(f"gspo.freeze names {name!r}: the model's parts are {parts}") from None
        return build(
            self.model,
            lr=g.learning_rate,
            steps=g.steps * g.mini_batches,
            warmup=g.warmup,
            weight_decay=g.weight_decay,
            betas=g.betas,
            clip=g.clip,
            zero=g.zero,
            precision=g.precision,
        )

    def _load(self) -> None:
        """Go on from the last whole checkpoint, and cut the metrics back to it."""
        found = load_checkpoint(self.engine, self.out / "checkpoints")
        if found is not None:
            self.step, state = found
            self.stream.load_state_dict(state)
        log = self.out / "metrics.jsonl"
        if self.rank == 0 and log.is_file():
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            self._write(log, "\n".join(kept))

    def _rejected(self) -> dict[str, str]:
        """Every rank's unreadable prompts and lines: which → why."""
        return {name: why for rank in gather(self.stream.rejected) for name, why in rank.items()}

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _log(self, metrics: dict[str, Any], writer: Any) -> None:
        if self.rank:
            return
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float):
                writer.add_scalar(f"gspo/{name}", value, self.step)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        part = path.with_name(path.name + ".part")
        part.write_text(text + "\n" if text else "", encoding="utf-8")
        part.replace(path)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        rest = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
        return Progress(*columns, *rest, disable=self.rank > 0)
