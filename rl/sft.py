"""Supervised fine-tuning: the training of the stages (`stages.trainer`) on chats, from a model of the run.

Packing, mixtures, sequence parallelism, checkpoints and the loss on the assistant's words are those of pre-training.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from rl.policy.model import freeze
from rl.preference.phase import (
    HeldOutQuestions,
    find_start,
    finished,
    heldout_questions,
    release,
    write_text,
)
from rl.preference.recipe import Sft
from rl.questions.heldout import Answered
from rl.recipe import RlRecipe
from rl.run.agree import agree, from_first
from rl.run.identity import check_ranks, claim, identity
from stages.data.items import Cache
from stages.data.sources.formats import files_of, format_of
from stages.distributed.checkpoints import checkpoints, checksum
from stages.distributed.parallel import check_sequence
from stages.distributed.ranks import first_rank
from stages.metrics import open_tracker
from stages.opening import Opened, open_trainer, save_model
from stages.recipe import Recipe, SourceRecipe
from stages.run import seed
from stages.stage import LanguageStage
from stages.typed_toml import to_toml


class FineTuning(LanguageStage):
    """Next-token training on the answers of chats."""

    name = "sft"
    recipe: Sft

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        """Everything trains but what the recipe freezes."""
        model.requires_grad_(True)
        freeze(model, self.recipe.freeze, "sft")
        return model


class SftTrainer:
    """Tunes the model of `run/<start>/model` and writes `run/sft/{metrics.jsonl, eval.json, checkpoints, model}`.

    Raises:
        CheckpointError: the stage to start from has no model, or `run/sft` is of another recipe, start model or data.
        ManifestError: no chats or no held-out questions.
        RecipeError: the recipe does not fit the number of processes.
    """

    def __init__(self, recipe: RlRecipe, run: str | Path) -> None:
        self.recipe, self.config, self.run = recipe, recipe.sft, Path(run)
        self.out = self.run / "sft"
        agree(lambda: check_sequence("sft", self.config.sequence_parallel, dist.get_world_size()))
        agree(lambda: [open_tracker(name) for name in recipe.trackers])
        self.start = agree(lambda: find_start(self.run, self.config.start, "sft"))
        self.heldout = HeldOutQuestions(
            self.out, heldout_questions(recipe, self.run, self.config.families), recipe, self.config.max_new_tokens
        )
        digests = agree(lambda: {name: mark for s in self.config.data.sources for name, mark in self._marks(s).items()})
        digests |= {recipe.heldout.manifest: self.heldout.found.digest}
        mine = agree(lambda: identity(self.run, recipe, digests, "sft"))
        check_ranks(mine)
        first_rank(lambda: claim(self.out, self.run, mine), OSError)
        self.done = finished(self.out)
        first_rank(lambda: write_text(self.out / "recipe.toml", to_toml(recipe)))

    def _marks(self, source: SourceRecipe) -> dict[str, str]:
        """Path of each local file of a source → its size and checksum; data sets of the hub and URLs have none."""
        if "://" in source.path or source.format == "hub":
            return {}
        path = source.path.replace("{run}", str(self.run))
        found = {}
        for file in map(Path, files_of(format_of(source, path), path)):
            inside = file.is_relative_to(self.run)
            name = str(file.relative_to(self.run)) if inside else str(file)
            found[name] = f"{file.stat().st_size} bytes, CRC-32 {checksum(file)}"
        return found

    def train(self) -> dict[str, Any]:
        """Evaluate, train (from the newest checkpoint, if there is one), evaluate again; the content of `eval.json`.

        A finished phase returns its result. While it trains, SIGUSR1 requests a checkpoint, SIGTERM a checkpoint and
        the end.

        Raises:
            KeyeError: after SIGTERM; the step was finished and saved, and the same command resumes from it.
        """
        c = self.config
        if self.done is not None and self.done["steps"] == c.steps:
            return self.done
        before = self._before()
        opened = self._open()
        opened.trainer.run()
        save_model(opened, self.out / "model")
        skipped = {f"{row['file']}:{row['line']}": row["reason"] for row in opened.quarantine.rows()}
        del opened
        release()
        written = agree(lambda: find_start(self.run, "sft", "mpo"))
        after = self.heldout.measure("after", written, c.precision, c.decode_batch_size)
        self.heldout.rejected |= skipped
        result = self.heldout.finish(before, after, steps=c.steps)
        if not c.keep_finished:  # twelve bytes a parameter that nothing resumes from
            first_rank(lambda: shutil.rmtree(self.out / "checkpoints", ignore_errors=True))
        return result

    def _before(self) -> list[Answered]:
        """The start model's answers: from an earlier start of a phase that has checkpoints, or drawn now."""
        known, c = self.heldout.known("before"), self.config
        begun = from_first(lambda: bool(checkpoints(self.out / "checkpoints")))
        if begun and known is not None:
            return known
        return self.heldout.measure("before", self.start, c.precision, c.decode_batch_size)

    def _open(self) -> Opened:
        """Model, data and trainer, resumed if there is a checkpoint; collective."""
        seed(self.recipe.seed + 1)
        c = self.config
        recipe = Recipe(
            "sft", c.data, multitask=c, seed=self.recipe.seed, precision=c.precision, trackers=self.recipe.trackers
        )
        processor = agree(self._processor)
        stage = FineTuning(c, processor)
        cache = Cache(c.data.cache_mb << 20)
        return open_trainer("multitask", recipe, self.run, cache, stage, processor, self.start, asdict(self.recipe))

    def _processor(self) -> KeyeProcessor:
        """The start model's processor with the phase's own encoder settings, which are saved with the tuned model."""
        processor = KeyeProcessor.from_pretrained(self.start.directory)
        return processor.with_encoder(**self.config.encoder) if self.config.encoder else processor
