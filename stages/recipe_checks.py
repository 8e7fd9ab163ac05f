"""Checks of a whole recipe: every value that is impossible is named by its key, before anything is loaded."""

from collections.abc import Callable
from typing import Any

from keye.errors import RecipeError
from stages.data.sources.transforms import checked

STAGES = ("vision", "alignment", "multitask", "annealing")
KINDS = ("video", "image", "text")
TRACKERS = ("wandb", "trackio")
FORMATS = ("jsonl", "json", "parquet", "webdataset", "hub")


def check(recipe: Any, file: str) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise RecipeError(f"{file}: {message}")

    need(bool(recipe.data.sources), "data.sources is empty; name at least one manifest")
    need(0 <= recipe.data.not_like_bits < 32, "data.not_like_bits must be in [0, 32), of 64 bits")
    need(bool(recipe.stages), f"no stage; add one of the tables {', '.join(STAGES)}")
    need(recipe.start in ("", *recipe.stages), f"start must be one of {', '.join(recipe.stages)}, or empty")
    need(recipe.precision in ("auto", "fp32", "bf16"), 'precision must be "auto", "fp32" or "bf16"')
    need(set(recipe.trackers) <= set(TRACKERS), f"trackers may name only {', '.join(TRACKERS)}")
    need(recipe.data.workers >= 0, "data.workers must be at least 1, or 0 to go by the cores")
    need(0 < recipe.data.max_bad_fraction <= 1, "data.max_bad_fraction must be above 0 and at most 1")
    data = recipe.data
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
        need(source.format in ("", *FORMATS), f"{key}.format must be one of {', '.join(FORMATS)}")
        need(source.shuffle >= 1, f"{key}.shuffle must be at least 1")
        unfit = checked(source.transforms, source.streaming)
        need(unfit is None, f"{key}.transforms: {unfit}")
        need(set(source.stages) <= set(STAGES), f"{key}.stages may name only {', '.join(STAGES)}")
    for name in recipe.stages:
        stage = getattr(recipe, name)
        for key in ("steps", "context", "packs", "sequence_parallel", "save_every", "keep", "heldout_steps"):
            need(getattr(stage, key) >= 1, f"{name}.{key} must be at least 1")
        need(stage.heldout_every >= 0, f"{name}.heldout_every must not be below 0")
        need(
            not stage.heldout_every or bool(data.heldout) or data.heldout_fraction > 0,
            f"{name}.heldout_every measures held-out samples, and there are none; give data.heldout or "
            "data.heldout_fraction",
        )
        need(0 <= stage.alike <= stage.packs, f"{name}.alike must be from 0 (a quarter) to {name}.packs")
        need(stage.lr > 0, f"{name}.lr must be above 0")
        parts = ("vision",) if name == "vision" else ("vision", "projector", "decoder")
        need(set(stage.lr_scale) <= set(parts), f"{name}.lr_scale may name only {', '.join(parts)}")
        need(all(factor > 0 for factor in stage.lr_scale.values()), f"{name}.lr_scale: factors must be above 0")
        need(stage.schedule in ("cosine", "constant"), f'{name}.schedule must be "cosine" or "constant"')
        need(stage.mlp_tiles >= 1, f"{name}.mlp_tiles must be at least 1")
        need(
            stage.checkpointing or not stage.offload,
            f"{name}.offload keeps what checkpointing recomputes from; set {name}.checkpointing = true besides",
        )
        for key, plain in (("sequence_parallel", 1), ("mlp_tiles", 1)):
            need(
                not stage.compile or getattr(stage, key) == plain,
                f"{name}.compile = true takes no {key} = {getattr(stage, key)}; set {name}.compile = false or "
                f"{name}.{key} = {plain}",
            )
        need(
            not stage.compile or stage.zero != 3 or stage.checkpointing,
            f"{name}.compile = true with zero = 3 would keep all gathered weights until the backward pass; set "
            f"{name}.checkpointing = true or {name}.compile = false",
        )
        need(stage.zero in (0, 1, 2, 3), f"{name}.zero must be 0, 1, 2 or 3")
        need(stage.hpz >= 1, f"{name}.hpz must be at least 1; 1 keeps no second copy")
        need(
            stage.hpz == 1 or (stage.hpz > 1 and stage.zero == 3),
            f"{name}.hpz = {stage.hpz} keeps a second copy of what ZeRO-3 cuts; set {name}.zero = 3 or hpz = 1",
        )
        for key in ("warmup", "weight_decay", "clip"):
            need(getattr(stage, key) >= 0, f"{name}.{key} must not be below 0")
        for key in ("spike_loss", "spike_norm"):
            need(getattr(stage, key) == 0 or getattr(stage, key) > 1, f"{name}.{key} must be above 1, or 0 for never")
        need(len(stage.betas) == 2, f"{name}.betas must be two numbers")
        need(set(stage.mixture) <= set(KINDS), f"{name}.mixture may name only {', '.join(KINDS)}")
        need(all(share >= 0 for share in stage.mixture.values()), f"{name}.mixture: a share is below 0")
        total = sum(stage.mixture.values())
        need(not stage.mixture or abs(total - 1) < 1e-6, f"{name}.mixture adds up to {total:g}, but must to 1")
    if recipe.vision is not None:
        vision, sizes = recipe.vision, ("pairs", "text_width", "text_layers", "text_heads", "text_length")
        for key in sizes:
            need(getattr(vision, key) >= 1, f"vision.{key} must be at least 1")
        need(vision.micro_pairs >= 0, "vision.micro_pairs must not be below 0")
        need(
            vision.sequence_parallel == 1,
            "vision.sequence_parallel must be 1, because its pairs are no sequence to be cut; remove the key",
        )
    if recipe.annealing is not None:
        need(recipe.annealing.rope_scale > 0, "annealing.rope_scale must be above 0")
        _check_through(recipe.annealing, need)


def _check_through(told: Any, need: Callable[[bool, str], None]) -> None:
    for text, steps in told.through.items():
        key = f"annealing.through.{text}"
        whole = text.isascii() and text.isdigit() and text[0] != "0"
        need(whole, f"{key} must be a context and its steps, such as 32768 = 100")
        context, tokens = int(text), told.packs * told.context
        need(context < told.context, f"{key} must be a context below annealing.context = {told.context}")
        need(
            tokens % context == 0,
            f"{key} does not divide the {tokens} tokens of a step; take annealing.context halved once or more",
        )
        need(steps >= 1, f"{key} = {steps}, but it must have at least 1 step")
