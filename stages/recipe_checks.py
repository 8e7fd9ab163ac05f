"""Checks of a complete recipe: an impossible value is named by its key, before anything is loaded.

The dataclasses are those of `stages.recipe`, which imports this module.
"""

from collections.abc import Collection, Mapping
from typing import Any

from keye.aggregation.settings import FeatureAggregation
from keye.checks import suggestion
from keye.encoder_config import EncoderConfig
from keye.errors import KeyeError
from keye.motion.settings import MotionSettings
from keye.slowfast.measures import get_measure
from keye.slowfast.policies import as_policy
from keye.slowfast.policies.wholeclip import TwoStream
from stages.data.sources.transforms import checked
from stages.optimizer import PARTS
from stages.typed_toml import Need, requirement

STAGES = ("vision", "alignment", "multitask", "annealing")
KINDS = ("video", "image", "text")
TRACKERS = ("wandb", "trackio")
FORMATS = ("jsonl", "json", "parquet", "webdataset", "hub")


def check(recipe: Any, file: str) -> None:
    """Refuse values that cannot work, alone or together.

    Raises:
        RecipeError: names the file and the key.
    """
    need = requirement(file)
    need(bool(recipe.stages), f"no stage; add one of the tables {', '.join(STAGES)}")
    need(recipe.start in ("", *recipe.stages), f"start must be one of {', '.join(recipe.stages)}, or empty")
    check_launch("precision", recipe.precision, recipe.trackers, need)
    _check_model(recipe.model, need)
    _check_data(recipe.data, need)
    _check_world(recipe.data.world, need)
    _check_encoder("processor.encoder", recipe.processor.encoder, need)
    for name in recipe.stages:
        stage = getattr(recipe, name)
        stage.check(name, need, ("vision",) if name == "vision" else PARTS)
        encoder = {**recipe.processor.encoder, **stage.encoder}
        _check_encoder(f"{name}.encoder", encoder, need)
        check_tower(name, stage, recipe.model.vision, encoder, recipe.processor.image, need)
        _check_stage(name, stage, need)
        _check_data_of_stage(name, stage, recipe.data, need)
    if recipe.vision is not None:
        _check_vision(recipe.vision, need)
    if recipe.annealing is not None:
        need(recipe.annealing.rope_scale > 0, "annealing.rope_scale must be above 0")
        _check_context_schedule(recipe.annealing, need)


def check_tower(
    name: str,
    stage: Any,
    vision: Mapping[str, Any],
    encoder: Mapping[str, Any],
    image: Mapping[str, Any],
    need: Need,
) -> None:
    """Refuse what the parts of a tower and an encoder's aggregation cannot do with the settings of a stage or phase.

    Args:
        name: of the stage's table, for the messages.
        stage: its settings.
        vision: the tower's `mixer` and `motion`, each of which may be missing.
        encoder, image: the processor's settings.

    Raises:
        RecipeError: by `need`.
    """
    from keye.model.vision import FRAME_PATCHES

    sequence, limit = getattr(stage, "sequence_parallel", 1), FRAME_PATCHES // 4
    aggregation = encoder.get("aggregation")
    need(
        not aggregation or sequence == 1,
        f"{name}.sequence_parallel must be 1 with an encoder's aggregation, which needs all frames of a video on "
        "one rank; set it to 1 or remove aggregation",
    )
    if vision.get("motion") is not None and name != "vision":
        need(
            bool(aggregation),
            "model.vision.motion needs the type and time of each frame; set processor.encoder.aggregation = "
            '"none", or "mean" or "max" to pool features as well',
        )
        policy = str(encoder.get("policy") or "").partition(":")[0].strip()
        need(
            policy != TwoStream.name or FeatureAggregation.of(aggregation).pool != "none",
            f"{name}: model.vision.motion needs each frame once, and the policy two_stream shows slow frames twice; "
            'use another policy, or aggregation "mean" or "max", which encode a frame once',
        )
    if vision.get("mixer", "attention") != "attention":
        tokens = max(encoder.get("max_tokens_per_frame", 768), image.get("max_tokens", 20_480))
        need(
            sequence == 1 or min(tokens, getattr(stage, "context", tokens)) <= limit,
            f"{name}.sequence_parallel = {sequence} divides frames of more than {limit} tokens among ranks, which "
            f"model.vision.mixer cannot do; set max_tokens_per_frame and processor.image.max_tokens to {limit} or less",
        )
        need(
            not getattr(stage, "compile", False),
            f"{name}.compile = true: model.vision.mixer cannot be compiled; set {name}.compile = false",
        )


def check_training(table: str, stage: Any, data: Any, need: Need) -> None:
    """Refuse impossible values of a stage outside a pre-training recipe, and of its data.

    Args:
        table: the stage's table, for the messages; its data are the table `data` in it.

    Raises:
        RecipeError: by `need`.
    """
    stage.check(table, need)
    _check_encoder(f"{table}.encoder", stage.encoder, need)
    _check_stage(table, stage, need)

    def within(ok: bool, text: str) -> None:
        need(ok, text.replace("data.", f"{table}.data."))

    _check_data(data, within)
    _check_data_of_stage(table, stage, data, within)


def check_launch(key: str, precision: str, trackers: Collection[str], need: Need) -> None:
    """Refuse an unknown precision, which is the value of `key`, and unknown trackers.

    Raises:
        RecipeError: by `need`.
    """
    need(precision in ("auto", "fp32", "bf16"), f'{key} must be "auto", "fp32" or "bf16"')
    need(set(trackers) <= set(TRACKERS), f"trackers may name only {', '.join(TRACKERS)}")


def _check_model(model: Any, need: Need) -> None:
    from keye.model.config import PRESETS  # loads transformers
    from keye.model.vision import MIXERS

    need(
        model.preset in PRESETS,
        f"model.preset = {model.preset!r} is not a preset; {suggestion(model.preset, PRESETS)}",
    )
    mixer = model.vision.get("mixer", "attention")
    need(mixer in MIXERS, f"model.vision.mixer = {mixer!r} is unknown; {suggestion(mixer, MIXERS)}")
    if "motion" in model.vision:
        try:
            MotionSettings.of(model.vision["motion"])
        except KeyeError as error:
            need(False, f"model.vision.motion: {error}")
    need(
        not (model.vision and model.path),
        "model.vision changes a preset, and model.path names a trained model; remove one of them",
    )


def _check_world(world: Any, need: Need) -> None:
    if world is None:
        return
    from keye.world import FAMILIES

    for key in ("counts", "heldout"):
        for family, count in getattr(world, key).items():
            name = f"data.world.{key}.{family}"
            need(family in FAMILIES, f"{name}: there is no such family; {suggestion(family, FAMILIES)}")
            need(count >= 0, f"{name} = {count} is negative; give 0 or more")


def _check_data(data: Any, need: Need) -> None:
    need(bool(data.sources), "data.sources is empty; name at least one manifest")
    need(0 <= data.decontaminate_bits < 32, "data.decontaminate_bits must be in [0, 32), of 64 bits")
    need(data.workers >= 0, "data.workers must be at least 1, or 0 to go by the cores")
    need(0 < data.max_bad_fraction <= 1, "data.max_bad_fraction must be above 0 and at most 1")
    need(0 <= data.heldout_fraction < 1, "data.heldout_fraction must be in [0, 1)")
    need(not (data.heldout and data.heldout_fraction), "give data.heldout or data.heldout_fraction, not both")
    need(
        not (data.heldout_fraction and any(source.streaming for source in data.sources)),
        "data.heldout_fraction selects rows by number, and a streaming source has none; name data.heldout instead",
    )
    named = [(f"data.sources[{i}]", source) for i, source in enumerate(data.sources)]
    for key, source in [*named, *((f"data.heldout[{i}]", source) for i, source in enumerate(data.heldout))]:
        need(source.kind in KINDS, f"{key}.kind must be one of {', '.join(KINDS)}")
        need(source.weight > 0, f"{key}.weight must be above 0")
        need(source.first_tokens >= 0, f"{key}.first_tokens must be 0 or more")
        need(source.format in ("", *FORMATS), f"{key}.format must be one of {', '.join(FORMATS)}")
        need(source.shuffle >= 1, f"{key}.shuffle must be at least 1")
        unfit = checked(source.transforms, source.streaming)
        need(unfit is None, f"{key}.transforms: {unfit}")
        need(set(source.stages) <= set(STAGES), f"{key}.stages may name only {', '.join(STAGES)}")


def _check_encoder(key: str, settings: dict[str, object], need: Need) -> None:
    """Refuse impossible settings of the encoder; names and types are known to be right."""
    try:
        config = EncoderConfig(**settings)
        as_policy(config.policy, config.threshold, get_measure(config.measure))
    except KeyeError as error:
        need(False, f"{key}: {error}")


def _check_data_of_stage(name: str, stage: Any, data: Any, need: Need) -> None:
    need(
        not stage.heldout_every or bool(data.heldout) or data.heldout_fraction > 0,
        f"{name}.heldout_every measures held-out samples, and there are none; give data.heldout or "
        "data.heldout_fraction",
    )
    need(set(stage.mixture) <= set(KINDS), f"{name}.mixture may name only {', '.join(KINDS)}")
    need(all(share >= 0 for share in stage.mixture.values()), f"{name}.mixture: a share is below 0")
    total = sum(stage.mixture.values())
    need(not stage.mixture or abs(total - 1) < 1e-6, f"{name}.mixture adds up to {total:g}, but must to 1")


def _check_stage(name: str, stage: Any, need: Need) -> None:
    counts = ("steps", "context", "global_batch_size", "sequence_parallel", "checkpoint_every", "keep_checkpoints")
    for key in (*counts, "heldout_steps", "mlp_tiles"):
        need(getattr(stage, key) >= 1, f"{name}.{key} must be at least 1")
    need(stage.heldout_every >= 0, f"{name}.heldout_every must not be below 0")
    need(
        0 <= stage.balanced_packs <= stage.global_batch_size,
        f"{name}.balanced_packs must be from 0 (a quarter) to {name}.global_batch_size",
    )
    for key in ("spike_loss", "spike_norm"):
        need(getattr(stage, key) == 0 or getattr(stage, key) > 1, f"{name}.{key} must be above 1, or 0 for never")
    need(
        stage.checkpointing or not stage.offload,
        f"{name}.offload keeps what checkpointing recomputes from; set {name}.checkpointing = true, too",
    )
    for key in ("sequence_parallel", "mlp_tiles"):
        need(
            not stage.compile or getattr(stage, key) == 1,
            f"{name}.compile = true takes no {key} = {getattr(stage, key)}; set {name}.compile = false or "
            f"{name}.{key} = 1",
        )
    need(
        not stage.compile or stage.zero != 3 or stage.checkpointing,
        f"{name}.compile = true with zero = 3 would keep all gathered weights until the backward pass; set "
        f"{name}.checkpointing = true or {name}.compile = false",
    )
    need(stage.zero in (0, 1, 2, 3), f"{name}.zero must be 0, 1, 2 or 3")
    need(stage.hpz >= 1, f"{name}.hpz must be at least 1; 1 keeps no second copy")
    need(
        stage.hpz == 1 or stage.zero == 3,
        f"{name}.hpz = {stage.hpz} keeps a second copy of what ZeRO-3 cuts; set {name}.zero = 3 or hpz = 1",
    )


def _check_vision(vision: Any, need: Need) -> None:
    for key in ("pairs", "text_width", "text_layers", "text_heads", "text_length"):
        need(getattr(vision, key) >= 1, f"vision.{key} must be at least 1")
    need(vision.micro_pairs >= 0, "vision.micro_pairs must not be below 0")
    need(
        vision.sequence_parallel == 1,
        "vision.sequence_parallel must be 1, because a pair is not a sequence to be cut; remove the key",
    )


def _check_context_schedule(annealing: Any, need: Need) -> None:
    for text, steps in annealing.context_schedule.items():
        key = f"annealing.context_schedule.{text}"
        number = text.isascii() and text.isdigit() and text[0] != "0"
        need(number, f"{key} must be a context and its steps, such as 32768 = 100")
        context, tokens = int(text), annealing.global_batch_size * annealing.context
        need(context < annealing.context, f"{key} must be a context below annealing.context = {annealing.context}")
        need(
            tokens % context == 0,
            f"{key} does not divide the {tokens} tokens of a step; take annealing.context halved once or more",
        )
        need(steps >= 1, f"{key} = {steps}, but it must have at least 1 step")
