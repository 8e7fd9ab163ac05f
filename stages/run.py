"""A complete pre-training run in one launch: world, tokenizer, model, then the stages one after the other."""

import dataclasses
import json
import random
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from keye.checkpoint.shards import atomic_directory, read_json
from keye.encoder import SlowFastEncoder
from keye.errors import CheckpointError, KeyeError, RecipeError, writing
from keye.files import write_atomically
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import load_tokenizer
from stages.alignment import Alignment
from stages.annealing import Annealing
from stages.contrastive import text_config
from stages.data.items import Cache
from stages.data.sources.formats import files_of, format_of
from stages.distributed import engine
from stages.distributed.hosts import local_ranks
from stages.distributed.parallel import ParallelDims, check_sequence
from stages.distributed.ranks import first_rank, on_every_rank, waiting_group
from stages.distributed.weights import open_start
from stages.metrics import open_tracker
from stages.multitask import Multitask
from stages.opening import Opened, batches_of, open_trainer, save_model, say
from stages.preparation import environment, prepare_tokenizer, prepare_world
from stages.recipe import STAGES, Recipe, StageRecipe, VisionRecipe, stage_of
from stages.recipe_checks import check_tower
from stages.report import page as report
from stages.stage import choose_sources
from stages.typed_toml import current_names, requirement, to_toml
from stages.vision import Vision

STAGE_CLASSES = {"vision": Vision, "alignment": Alignment, "multitask": Multitask, "annealing": Annealing}
DONE = "stage.json"
# Keys of a stage that do not change what is trained.
NOT_TRAINED = (
    "checkpoint_every", "keep_checkpoints", "keep_finished", "async_checkpoints", "heldout_every", "heldout_steps",
)  # fmt: skip
START = "start"  # folder of the model that a run draws for itself


def pretrain(recipe: Recipe, run: str | Path, only: str | None = None) -> None:
    """Run all stages of a recipe, or the stage `only`; finished ones are skipped, one that was begun is resumed.

    Args:
        run: directory of the run. only: a stage, or one of its phases.

    Raises:
        KeyeError: a mistake that the user can correct.
    """
    if not any(wanted(name, only) for name in recipe.chain):
        raise RecipeError(f"the recipe has no stage {only}; it has {', '.join(recipe.chain)}")
    run = Path(run)
    transformers.utils.logging.disable_progress_bar()
    engine.start()
    seed(recipe.seed)
    first_rank(lambda: check(recipe, run, only))
    first_rank(lambda: begin(recipe, run))
    first_rank(lambda: prepare_world(recipe, run), OSError)
    first_rank(lambda: prepare_tokenizer(recipe, run), OSError)
    cache = Cache(recipe.data.cache_mb << 20)
    for name in recipe.chain:
        if wanted(name, only):
            try:
                run_stage(name, recipe, run, cache)
            finally:
                if dist.get_rank() == 0:
                    write_report(run)
    engine.stop()


def write_report(run: Path) -> None:
    """Write the report of a run; one that cannot be written is a message, because the training can go on."""
    try:
        report.write(run)
    except (KeyeError, OSError, ValueError) as error:
        print(f"the report was not written: {error}", flush=True)


def begin(recipe: Recipe, run: Path) -> None:
    """Make the directory of the run, with its recipe and environment.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(run, "the run", CheckpointError):
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / "recipe.toml", to_toml(recipe))
        write_atomically(run / "environment.json", json.dumps(environment(recipe.seed), indent=2) + "\n")


def check(recipe: Recipe, run: Path, only: str | None) -> None:
    """Find what would stop a later stage before anything is trained.

    Raises:
        KeyeError: names the file or key at fault.
    """
    stages = {stage_of(name) for name in recipe.chain if wanted(name, only)}
    for source in (*recipe.data.sources, *recipe.data.heldout):
        if source.stages and not stages & set(source.stages):
            continue
        if "{run}" not in source.path and "://" not in source.path and source.format != "hub":
            files_of(format_of(source, source.path), source.path)
    for path in recipe.data.decontaminate_against:
        if "{run}" not in path and "://" not in path and not Path(path).exists():
            raise RecipeError(f"{path}: no such manifest; correct the path in data.decontaminate_against")
    for tracker in recipe.trackers:
        open_tracker(tracker)
    earlier = None if only is None else before(recipe, next(name for name in recipe.chain if wanted(name, only)))
    if earlier and not (run / earlier / DONE).exists():
        raise CheckpointError(
            f"{run / earlier} is not finished; run the stage {earlier} before {only}, or begin with the "
            f"recipe's model by --set start={stage_of(only)}"
        )
    check_finished(recipe, run, only)
    first, path = next(iter(recipe.chain)), recipe.model.path
    begins = wanted(first, only) and not (run / first / DONE).exists()
    if path and begins and not (Path(path) / "config.json").is_file():
        raise RecipeError(f'model.path = "{path}" is not a model directory; create one with keye convert init')
    tower = read_json(Path(path) / "config.json").get("vision_config") if path and begins else None
    world = dist.get_world_size()
    for name, stage in recipe.chain.items():
        if wanted(name, only) and not (run / name / DONE).exists():
            encoder = make_encoder(recipe, stage)
            if tower is not None:
                need = requirement(path)
                check_tower(stage_of(name), stage, tower, encoder.settings, recipe.processor.image, need)
            choose_sources(name, recipe)
            if stage.heldout_every:
                choose_sources(name, recipe, heldout=True)
            check_sequence(stage_of(name), stage.sequence_parallel, world)
            check_hpz(name, stage.hpz, local_ranks(devices=torch.cuda.device_count()))
            batches_of(name, stage, ParallelDims(0, world, stage.sequence_parallel, None))
            if isinstance(stage, VisionRecipe) and stage.text_model:
                text_config(stage.text_model)


def check_hpz(name: str, hpz: int, ranks: int) -> None:
    """Refuse an `hpz` that does not divide the `ranks` of a node.

    Raises:
        RecipeError: names the key and the remedy.
    """
    if ranks % hpz:
        raise RecipeError(
            f"{name}.hpz = {hpz} does not divide the {ranks} processes of a node, which keep the weights among them; "
            f"set it to {ranks}, or to 1 for none"
        )


def check_finished(recipe: Recipe, run: Path, only: str | None) -> None:
    """Refuse finished stages that this recipe and run would not train in the same way.

    Raises:
        CheckpointError: one was trained with another recipe, or from weights that the stage before it no longer has.
    """
    for name, phase in recipe.chain.items():
        if wanted(name, only) and (run / name / DONE).exists():
            done = finished(run / name)
            wanted_now = stage_table(phase)
            trained = current_names(type(phase), done.get("recipe") or wanted_now)
            # A key that recipes did not have when the stage was trained had its default.
            trained = stage_table(type(phase)(steps=1, learning_rate=1.0)) | trained
            changed = [key for key in wanted_now if key not in NOT_TRAINED and trained[key] != wanted_now[key]]
            if changed:
                raise CheckpointError(
                    f"{name} was finished with {changed[0]} = {trained[changed[0]]!r}, but the recipe says "
                    f"{wanted_now[changed[0]]!r}; remove {run / name} to train it again, or take another --out"
                )
            earlier = before(recipe, name)
            if earlier and done.get("start") is None and not (run / earlier / DONE).exists():
                raise CheckpointError(
                    f"{name} was trained without {earlier}; give --set start={stage_of(name)} as before, or take "
                    "another --out"
                )
            if done.get("start") != made(recipe, run, name):
                weights = f"{run / earlier} has now" if earlier else "the recipe's model"
                raise CheckpointError(
                    f"{name} was trained from other weights than {weights}; remove {run / name} to train it again, or "
                    "take another --out"
                )


def before(recipe: Recipe, name: str) -> str | None:
    """The phase of a recipe's chain before one of them; None before the first."""
    chain = [None, *recipe.chain]
    return chain[chain.index(name) - 1]


def wanted(name: str, only: str | None) -> bool:
    """Whether a phase is to be trained: all are without `only`, which may name a stage or one of its phases."""
    return only in (None, name, stage_of(name))


def made(recipe: Recipe, run: Path, name: str) -> str | None:
    """The mark of the weights that stage `name` begins with, which the stage before left; None without one."""
    record = run / (before(recipe, name) or "") / DONE
    return finished(record.parent).get("made") if record.exists() else None


def finished(folder: Path) -> dict[str, Any]:
    """The record of a finished stage in `folder`.

    Raises:
        CheckpointError: it is damaged.
    """
    return read_json(folder / DONE, f"remove {folder} to train the stage again")


def stage_table(stage: StageRecipe) -> dict[str, object]:
    """A stage's recipe as it is after a round trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(stage)))


def open_stage(name: str, recipe: Recipe, run: Path, cache: Cache) -> Opened:
    """Model, data and trainer of one stage, resumed if `run/name` has a checkpoint; collective."""
    config = recipe.chain[name]
    seed(recipe.seed + 1 + STAGES.index(stage_of(name)))
    each = partial(on_every_rank, group=waiting_group(dist.group.WORLD))
    processor = each(lambda: make_processor(recipe, config, run))
    first_rank(lambda: prepare_start(name, recipe, run), OSError)
    stage = STAGE_CLASSES[stage_of(name)](config, processor)
    start = each(lambda: open_start(start_of(name, recipe, run)))
    return open_trainer(name, recipe, run, cache, stage, processor, start)


def run_stage(name: str, recipe: Recipe, run: Path, cache: Cache) -> None:
    """Train one stage from the model of the one before, and write `run/name/model`."""
    folder = run / name
    if (folder / DONE).exists():
        say(f"{name}: finished before, skipped; remove {folder} to train it again")
        return
    opened = open_stage(name, recipe, run, cache)
    opened.trainer.run()
    save_model(opened, folder / "model")
    first_rank(lambda: finish(name, recipe, run, len(opened.quarantine.rows())), OSError)


def finish(name: str, recipe: Recipe, run: Path, skipped: int) -> None:
    """Record that a stage is finished, and remove what nothing resumes from.

    Args:
        skipped: number of samples in quarantine.

    Raises:
        CheckpointError: the record cannot be written.
    """
    folder, stage = run / name, recipe.chain[name]
    done = {
        "steps": stage.steps,
        "skipped": skipped,
        "recipe": stage_table(stage),
        "made": uuid.uuid4().hex,
        "start": made(recipe, run, name),
    }
    with writing(folder / DONE, kind=CheckpointError):
        write_atomically(folder / DONE, json.dumps(done) + "\n")
    shutil.rmtree(run / START, ignore_errors=True)
    if not stage.keep_finished:  # twelve bytes a parameter that nothing resumes from
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def start_of(name: str, recipe: Recipe, run: Path) -> Path:
    """The model's directory that a phase begins with: of the phase before, of the recipe, or the drawn one."""
    earlier = before(recipe, name)
    if earlier:
        return run / earlier / "model"
    return Path(recipe.model.path) if recipe.model.path else run / START


def prepare_start(name: str, recipe: Recipe, run: Path) -> None:
    """Draw the model that the first phase begins with, where the recipe names none, and write it to `run/start`.

    One process draws it for all; a directory of another recipe is replaced. It is removed when the phase is finished.
    Stage 0 draws its text tower next. So the state of the generator after the draw is kept with the model, and a run
    that goes on with a model drawn earlier continues from the same state.
    """
    out = run / START
    if start_of(name, recipe, run) != out:
        return
    drawn_for = {"model": dataclasses.asdict(recipe.model), "seed": recipe.seed}
    record, generator = out / "drawn.json", out / "generator.pt"
    seed(recipe.seed + 1 + len(STAGES))
    if record.exists() and generator.exists() and json.loads(record.read_text()) == drawn_for:
        torch.set_rng_state(torch.load(generator, weights_only=True))
        return
    shutil.rmtree(out, ignore_errors=True)
    processor = make_processor(recipe, recipe.chain[name], run)
    config = KeyeConfig.preset(recipe.model.preset, dict(recipe.model.vision), vocab_size=len(processor.tokenizer))
    model = KeyeForConditionalGeneration(processor.configure(config)).to(torch.float32)
    with atomic_directory(out) as part:
        model.save_pretrained(part)
        torch.save(torch.get_rng_state(), part / generator.name)
        (part / record.name).write_text(json.dumps(drawn_for) + "\n")


def make_encoder(recipe: Recipe, stage: StageRecipe) -> SlowFastEncoder:
    """The stage's encoder.

    Raises:
        RecipeError: it has no such measure or policy, or settings that do not go together.
    """
    settings = {**recipe.processor.encoder, **stage.encoder}
    try:
        return SlowFastEncoder(**settings)
    except KeyeError as error:
        raise RecipeError(f"processor.encoder, or the encoder of a stage: {error}") from error


def make_processor(recipe: Recipe, stage: StageRecipe, run: Path) -> KeyeProcessor:
    """The processor with the stage's own encoder settings."""
    settings = {**recipe.processor.encoder, **stage.encoder}
    return KeyeProcessor(load_tokenizer(str(run / "tokenizer")), encoder=settings, image=recipe.processor.image)


def seed(value: int) -> None:
    """Seed every generator."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
