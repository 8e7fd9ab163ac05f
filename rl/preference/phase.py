"""What the phases SFT and MPO share: their start model, the models that only answer, held-out questions, files."""

from __future__ import annotations

import gc
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.errors import CheckpointError, ManifestError, writing
from keye.files import write_atomically
from keye.processor.processor import KeyeProcessor, Sample
from rl.questions.heldout import Answered, ask, compare, read_answers, write_answers
from rl.questions.prompts import Prompt, PromptSet, load_prompts
from rl.recipe import RlRecipe
from rl.rewards import rewards_from
from rl.rollout import InProcessRollout
from rl.rollout.build import token_ids
from rl.rollout.config import Rollout
from rl.run.agree import agree, from_first, gather
from stages.distributed.engine import device, resolve_precision
from stages.distributed.ranks import first_rank
from stages.distributed.weights import Start, open_start


def find_start(run: Path, start: str, table: str) -> Start:
    """The model of the stage or phase `start` of a run.

    Args:
        table: the phase's table in the recipe, for the message.

    Raises:
        CheckpointError: it has no model.
    """
    folder = run / start / "model"
    if (folder / "config.json").is_file():
        return open_start(folder)
    found = sorted(path.parents[1].name for path in run.glob("*/model/config.json") if path.parts[-3] != table)
    remedy = f"set {table}.start to one of {', '.join(found)}" if found else "link a model there or pre-train"
    raise CheckpointError(f"{folder} has no model: {remedy}")


class Answerer:
    """A complete model on this rank that answers questions and does not train.

    Args:
        start: its files. precision: "auto", "fp32" or "bf16". batch: answers that are decoded together.
        rollout: the recipe's `[rollout]`, so that a phase samples as GSPO does.
    """

    def __init__(self, start: Start, precision: str, batch: int, rollout: Rollout | None = None) -> None:
        self.start = start
        self.processor = KeyeProcessor.from_pretrained(start.directory)
        dtype = torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32
        self.model = start.build(dtype, device()).eval().requires_grad_(False)
        self.generator = torch.Generator(device())
        how = rollout or Rollout()
        stop = token_ids(how.stop_tokens, self.processor)
        self.rollout = InProcessRollout(
            self.model, self.processor, self.generator, batch, how.cache_mb << 20, how.top_p, how.top_k, stop
        )

    def encode(self, prompt: Prompt) -> Sample:
        """The prompt's chat up to the answer, with the processor's encoder settings and those of its messages."""
        return self.processor.sample(prompt.messages, prompt.base_dir, add_generation_prompt=True)


def release() -> None:
    """Free the memory of models that nothing refers to any more, before the next one is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class HeldOutQuestions:
    """The held-out questions of a phase, and their answers before and after it.

    Args:
        out: the phase's folder. found: the questions. recipe: for the rewards, the limits and the seed.
        max_new_tokens: tokens of an answer at most.
    """

    out: Path
    found: PromptSet
    recipe: RlRecipe
    max_new_tokens: int

    def __post_init__(self) -> None:
        seen: Counter[str] = Counter()
        self.questions: list[Prompt] = []
        self.rejected = dict(self.found.rejected)
        for prompt in self.found.prompts:
            seen[prompt.family] += 1
            if seen[prompt.family] <= self.recipe.heldout.limit:
                self.questions.append(prompt)

    def known(self, name: str) -> list[Answered] | None:
        """The answers that an earlier start of this phase wrote, on every rank; collective."""
        return from_first(lambda: read_answers(self.out / f"{name}.jsonl", self.questions))

    def measure(self, name: str, start: Start, precision: str, batch: int) -> list[Answered]:
        """The answers of the model `start`, written to `<name>.jsonl`; collective.

        Raises:
            ManifestError: on all ranks, when no question can be read.
        """
        answered, rejected = self._ask(name, start, precision, batch)
        release()
        rows = [one for part in gather(answered) for one in part]
        for part in gather(rejected):
            self.rejected |= part
        if not rows:
            raise ManifestError(f"no question of {self.recipe.heldout.manifest} can be read: give clips that decode")
        first_rank(lambda: write_answers(self.out / f"{name}.jsonl", rows), OSError)
        return rows

    def _ask(self, name: str, start: Start, precision: str, batch: int) -> tuple[list[Answered], dict[str, str]]:
        """This rank's answers, and the questions that it cannot read."""
        wanted, rank, world = self.recipe.heldout, dist.get_rank(), dist.get_world_size()
        answerer = agree(lambda: Answerer(start, precision, batch, self.recipe.rollout))
        reward = agree(lambda: rewards_from(self.recipe.rewards, self.out.parent))
        mine = self.questions[rank::world]
        how = (wanted.samples, wanted.temperature, self.max_new_tokens)
        with progress_bar() as bar:
            task = bar.add_task(f"held-out reward {name}", total=len(mine) * world)

            def progress(count: int) -> None:
                bar.advance(task, count * world)

            # The seed of GSPO's evaluation, so that the phases of a run are compared on the same draws.
            seed = self.recipe.seed
            return agree(lambda: ask(answerer.rollout, mine, answerer.encode, reward, *how, progress, seed))

    def finish(self, before: list[Answered], after: list[Answered], **more: Any) -> dict[str, Any]:
        """Write `eval.json`, which marks the phase as finished; returns its content."""
        result = compare(before, after) | {"seed": self.recipe.seed, "rejected": self.rejected} | more
        first_rank(lambda: write_text(self.out / "eval.json", json.dumps(result, indent=1) + "\n"))
        return result


def heldout_questions(recipe: RlRecipe, run: Path, families: tuple[str, ...]) -> PromptSet:
    """The held-out questions of a recipe, with a remark on the screen on what is left out; collective."""
    found = agree(lambda: load_prompts(run / recipe.heldout.manifest, families, unique=True))
    say(found.remarks)
    return found


def say(lines: list[str]) -> None:
    """Print sentences on the first rank."""
    if dist.get_rank() == 0:
        for line in lines:
            print(line, flush=True)


def finished(out: Path) -> dict[str, Any] | None:
    """The content of `eval.json` of a finished phase, on every rank; None if it is not finished. Collective."""

    def read() -> dict[str, Any] | None:
        path = out / "eval.json"
        if not path.is_file() or not (out / "model/config.json").is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove {out} to train again") from error

    return from_first(read)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; CheckpointError if it cannot be written."""
    with writing(path, kind=CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def progress_bar() -> Progress:
    """A bar with counts and the remaining time, shown on the first rank only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = dist.is_initialized() and dist.get_rank() > 0
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), disable=hidden)
