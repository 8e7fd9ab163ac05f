"""Open a stage for training: its model, data and trainer, and write its model when it is trained."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from stages.data.items import Cache
from stages.data.loader import encoding_threads
from stages.data.quarantine import Quarantine
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import ParallelDims, build_parallel_dims
from stages.distributed.ranks import on_every_rank, waiting_group
from stages.distributed.weights import Start, replace_model
from stages.recipe import Recipe, StageRecipe, VisionRecipe, stage_of
from stages.recipe_checks import check_tower
from stages.stage import Stage, open_mixture
from stages.trainer import Trainer, micro_batches
from stages.typed_toml import requirement


@dataclasses.dataclass(frozen=True)
class Opened:
    """A stage that is ready to train: its trainer, and what is saved with its model."""

    trainer: Trainer
    model: KeyeForConditionalGeneration
    module: nn.Module
    start: Start
    processor: KeyeProcessor
    quarantine: Quarantine


def open_trainer(
    name: str, recipe: Recipe, run: Path, cache: Cache, stage: Stage, processor: KeyeProcessor, start: Start,
    settings: dict[str, Any] | None = None,
) -> Opened:  # fmt: skip
    """The trainer of `stage` from the model `start`; collective.

    Args:
        name: the phase of the recipe's chain with the settings of the stage; the folder is `run/name`, or that of
            `stage.name` if the recipe is not of pre-training. settings: for the trackers; default the recipe.
    """
    config = recipe.chain[name]
    folder = run / (name if settings is None else stage.name)
    each = partial(on_every_rank, group=waiting_group(dist.group.WORLD))
    label = stage_of(name) if settings is None else stage.name
    check_start(label, config, start, processor.encoder, processor.image)
    grid = build_parallel_dims(config.sequence_parallel)
    dtype = torch.bfloat16 if engine.resolve_precision(recipe.precision) == "bf16" else torch.float32
    # With ZeRO-3 the engine reads the weights, so that no rank keeps more of them than its share.
    device = "meta" if config.zero == 3 else engine.device()
    model = each(lambda: start.build(dtype, device, stage.parts))
    apply_memory_options(model, config.checkpointing, config.offload, config.mlp_tiles, config.compile)
    if config.compile:
        say(f"{folder.name}: layers are compiled in the first steps, which takes a minute or more")
    module = stage.prepare(model).train()
    quarantine = Quarantine(folder / "quarantine.jsonl", grid.rank)
    workers = encoding_threads(recipe.data.workers)
    given, batches = (name, recipe, processor, grid, cache, quarantine, str(run)), batches_of(name, config, grid)
    mixture = each(lambda: open_mixture(*given))
    heldout: list[list[dict[str, Any]]] = []
    if config.heldout_every:  # the same batches each time, kept in host memory
        held_out = each(lambda: open_mixture(*given, heldout=True))
        held = stage.loader(held_out, grid, model, workers)
        heldout = [[held.next() for _ in range(batches)] for _ in range(config.heldout_steps)]
        held.close()
    loader = stage.loader(mixture, grid, model, workers)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    ranks = f"{grid.data_size} × {grid.sequence} ranks"
    say(f"{folder.name}: {trained / 1e6:.2f} M parameters, {config.steps} steps, {ranks}")
    trainer = Trainer(
        stage, module, loader, grid, config, folder, batches, recipe.precision, recipe.trackers,
        settings or dataclasses.asdict(recipe), sources=start.sources(model), heldout=heldout,
    )  # fmt: skip
    return Opened(trainer, model, module, start, processor, quarantine)


def check_start(
    name: str, stage: Any, start: Start, encoder: Mapping[str, Any], image: Mapping[str, Any] | None = None
) -> None:
    """Refuse what the model `start` cannot do with the settings of a stage or phase.

    A recipe that draws its model is refused before that.

    Args:
        name: of the stage's table. stage: its settings. encoder, image: the processor's settings.

    Raises:
        RecipeError: names the model's directory and the key.
    """
    tower = start.config.vision_config
    parts = {"mixer": tower.mixer, "motion": tower.motion}
    check_tower(name, stage, parts, encoder, image or {}, requirement(str(start.directory)))


def open_processor(name: str, config: Any, start: Start) -> KeyeProcessor:
    """The processor of a phase's start model, after `check_start`."""
    processor = KeyeProcessor.from_pretrained(start.directory)
    check_start(name, config, start, processor.encoder, processor.image)
    return processor


def batches_of(name: str, stage: StageRecipe, grid: ParallelDims) -> int:
    """Batches of a step on each rank; a RecipeError if they do not divide among the ranks."""
    if isinstance(stage, VisionRecipe):
        return stage.micro_batches(grid.data_size)
    return micro_batches(name, stage.global_batch_size, grid)


def save_model(opened: Opened, out: Path) -> None:
    """Write the model of a stage, completely or not at all; collective.

    Raises:
        CheckpointError: on all ranks, when rank 0 cannot write it.
    """
    replace_model(opened.model, opened.module, opened.start, out, opened.processor.save_pretrained)


def say(text: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)
