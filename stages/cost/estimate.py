"""Estimate: the cost of a recipe before it runs, as parameters, memory per GPU, operations, time and money.

Nothing is measured here. Shapes come from the config, operations from `keye.model.flops`, memory from
`stages.cost.footprint` (of a GPU) and `stages.cost.host_memory` (of a node), samples from `stages.cost.work`, devices
from `stages.cost.gpus`. Every assumption is a field of `Assumptions`, `Node` or `Kind` and is printed with the result.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import SiglipTextConfig

from keye.errors import RecipeError
from keye.model import flops
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import FRAME_PATCHES
from stages.cost.footprint import (
    CHANNELS,
    FP32,
    Footprint,
    Plan,
    Share,
    footprint,
    reduced,
    states,
    tower_chunk,
    tower_gradients,
    tower_layer,
)
from stages.cost.gpus import Gpu
from stages.cost.host_memory import HostFootprint, Node, host_footprint
from stages.cost.work import Kind, Work, kinds_of, largest_frame, mixture_read, square, work_of
from stages.losses import LOGITS
from stages.recipe import Recipe, StageRecipe, VisionRecipe, stage_of

DAY, HOUR = 86400.0, 3600.0
SIGLIP_VOCABULARY = 32_000  # tokens of SigLIP's tokenizer
UPDATE_PASSES = 7  # fp32 values of a parameter that AdamW moves: gradient, master, two moments read, three written


@dataclass(frozen=True)
class Assumptions:
    """Assumptions in addition to the recipe.

    utilisation: share of the peak rate at which matrix products run, those of recomputed layers included. usable: share
    of the GPU memory for tensors; the driver, the libraries and the allocator's gaps take the rest. kinds: known
    samples; the recipe's budgets give the others (`kinds_of`). node: of the hosts.
    """

    utilisation: float = 0.4
    usable: float = 0.92
    kinds: dict[str, Kind] = field(default_factory=dict)
    node: Node = Node()


@dataclass(frozen=True)
class StageCost:
    """The cost of one phase of the chain.

    tokens: of a step. flops, flops_done: operations of a step over all ranks, without and with recomputation. memory:
    of a GPU. host: of a node. seconds: of a step. remedy: settings that make the phase fit, "" if it fits.
    """

    name: str
    parameters: int
    trained: int
    tokens: int
    steps: int
    flops: float
    flops_done: float
    memory: Footprint
    host: HostFootprint
    fits: bool
    seconds: float
    mfu: float
    days: float
    dollars: float
    remedy: str


def estimate(recipe: Recipe, gpu: Gpu, gpus: int, assumed: Assumptions | None = None) -> list[StageCost]:
    """The cost of every phase of a recipe's chain on `gpus` devices.

    Raises:
        RecipeError: the packs or sequence groups of a stage cannot be divided by the number of devices.
    """
    assumed = assumed or Assumptions()
    config = config_of(recipe)
    counts = parameters_of(config)
    return [_phase(name, recipe, config, counts, gpu, gpus, assumed) for name in recipe.chain]


def config_of(recipe: Recipe) -> KeyeConfig:
    """The model's config: from its directory if that exists, else from the preset."""
    path = Path(recipe.model.path)
    if recipe.model.path and (path / "config.json").is_file():
        return KeyeConfig.from_pretrained(path)
    own = not (recipe.model.path or recipe.model.tokenizer)
    words = {"vocab_size": recipe.model.vocab_size} if own else {}
    return KeyeConfig.preset(recipe.model.preset, dict(recipe.model.vision), **words)


def parameters_of(config: KeyeConfig) -> dict[str, int]:
    """Parameters of the tower (`visual`), the projector and the rest (`language`), counted on the meta device."""
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    parts = {"visual": 0, "projector": 0, "language": 0}
    for name, parameter in model.named_parameters():
        part = name.removeprefix("model.").partition(".")[0]
        parts[part if part in parts else "language"] += parameter.numel()
    return parts


def step_flops(config: Any, name: str, work: Work, stage: StageRecipe) -> tuple[float, float]:
    """Operations of a step: (of the model, performed). The second number includes recomputation.

    In the alignment nothing below the projector has a backward pass, and the decoder's has no gradients of weights.
    """
    frozen = stage_of(name) == "alignment"
    vision, text = config.vision_config, config.text_config
    tower = flops.tower(vision, work.frames)
    projector = flops.projector(vision.hidden_size, text.hidden_size, work.patches)
    decoder, head = flops.decoder(text, work.documents), flops.head(text, work.labels)
    if frozen:
        model = tower.total + 3 * projector.total + 2 * (decoder.linear + head.linear) + 3 * decoder.quadratic
    else:
        model = flops.TRAINING * (tower + projector + decoder + head).total
    again = head.total  # the loss is always computed in chunks, twice
    product = 2 * sum(work.documents) * text.hidden_size * text.intermediate_size * text.num_hidden_layers
    if stage.checkpointing:
        # Without the last product of the MLPs and of the projector: the backward pass does not need its result.
        last = product + 2 * (work.patches // 4) * 4 * vision.hidden_size * text.hidden_size
        again += decoder.linear + projector.total + (0 if frozen else tower.linear) - last
        # Results of attention are kept, except with offloading.
        again += decoder.quadratic + (0 if frozen else tower.quadratic) if stage.offload else 0
    if stage.mlp_tiles > 1:
        # Two of a tile's three products; with recomputed layers all three, except for the last tile.
        again += product * (3 * (stage.mlp_tiles - 1) / stage.mlp_tiles if stage.checkpointing else 2)
    return model, model + again


def _phase(
    name: str, recipe: Recipe, config: Any, counts: dict[str, int], gpu: Gpu, gpus: int, assumed: Assumptions
) -> StageCost:
    stage = stage_of(name)
    settings = getattr(recipe, stage)  # of the stage; phases with an intermediate context derive from it

    def estimated(changes: dict[str, Any]) -> StageCost | None:
        other = dataclasses.replace(recipe, **{stage: dataclasses.replace(settings, **changes)})
        try:
            return _estimate(name, other, other.chain[name], config, counts, gpu, gpus, assumed)
        except RecipeError:
            return None

    made = _estimate(name, recipe, recipe.chain[name], config, counts, gpu, gpus, assumed)
    if made.fits:
        return made
    for changes in _remedies(settings, gpus):
        if (other := estimated(changes)) and other.fits:
            for key in list(changes):  # leave out what is not needed
                fewer = {k: v for k, v in changes.items() if k != key}
                changes = fewer if (other := estimated(fewer)) and other.fits else changes
            remedy = " ".join(f"--set {stage}.{key}={str(value).lower()}" for key, value in changes.items())
            return dataclasses.replace(made, remedy=remedy)
    return dataclasses.replace(made, remedy="no setting of the recipe makes it fit; use a larger GPU, or more of them")


def _remedies(settings: StageRecipe, gpus: int) -> list[dict[str, Any]]:
    """Changes that save memory, about the cheapest first, each in addition to the ones before."""
    changes: dict[str, Any] = {}
    tried = []
    if not settings.checkpointing:
        changes = {**changes, "checkpointing": True}
        tried.append(changes)
    if not isinstance(settings, VisionRecipe) and settings.mlp_tiles == 1:
        changes = {**changes, "mlp_tiles": 4}
        tried.append(changes)
    if isinstance(settings, VisionRecipe):
        micro = settings.pairs // gpus // settings.micro_batches(gpus)
        while micro % 2 == 0:
            micro //= 2
            changes = {**changes, "micro_pairs": micro}
            tried.append(changes)
    for zero in range(settings.zero + 1, 4):
        changes = {**changes, "zero": zero}
        tried.append(changes)
    if not (settings.offload or isinstance(settings, VisionRecipe)):
        changes = {**changes, "offload": True}
        tried.append(changes)
    if isinstance(settings, VisionRecipe):  # fewer negatives per pair: this changes the training itself
        pairs = settings.pairs
        while pairs % (2 * gpus * changes.get("micro_pairs", 1)) == 0:
            pairs //= 2
            tried.append({**changes, "pairs": pairs})
        return tried
    sequence = settings.sequence_parallel
    while sequence * 2 <= gpus:
        sequence *= 2
        tried.append({**changes, "sequence_parallel": sequence})
    return tried


def _estimate(
    name: str, recipe: Recipe, settings: StageRecipe, config: Any, counts: dict[str, int], gpu: Gpu, gpus: int,
    assumed: Assumptions,
) -> StageCost:  # fmt: skip
    kinds = {**kinds_of(recipe, settings), **assumed.kinds}
    settings = dataclasses.replace(settings, mixture=mixture_read(name, recipe, _tokens(settings, kinds)))
    element = 4 if recipe.precision == "fp32" else 2
    plan = Plan(
        element, settings.zero, gpus, settings.checkpointing, settings.offload, settings.mlp_tiles, hpz=settings.hpz
    )
    if isinstance(settings, VisionRecipe):
        frame = largest_frame(recipe, settings, frames=settings.mixture.get("video", not settings.mixture) > 0)
        total, trained, memory, (model, done), tokens = _contrastive(settings, config, counts, plan, kinds, frame)
        step, pinned, drawn = Share(0, 4 * tokens, 0), 0.0, total - counts["visual"]
    else:
        packs, ranks = settings.global_batch_size, gpus // settings.sequence_parallel
        if gpus % settings.sequence_parallel or packs % ranks:
            sequence, stage = settings.sequence_parallel, stage_of(name)
            raise RecipeError(
                f"{name}: {packs} packs, each on {sequence} ranks, cannot be divided by {gpus} GPUs; give --gpus a "
                f"multiple of {sequence} that divides {packs * sequence}, or change {stage}.sequence_parallel or "
                f"{stage}.global_batch_size"
            )
        total = sum(counts.values())
        frozen = stage_of(name) == "alignment"
        trained = counts["projector"] if frozen else total
        work, tokens = work_of(settings, kinds), packs * settings.context
        parts = packs * settings.sequence_parallel
        frame = largest_frame(recipe, settings)
        share = Share(tokens // parts, work.patches // parts, work.labels // parts, frame)
        plan = dataclasses.replace(plan, micro_batches=packs // ranks)
        memory = footprint(config, plan, share, total, trained, frozen)
        model, done = step_flops(config, name, work, settings)
        step, pinned, drawn = Share(tokens, work.patches, work.labels), share.tokens, 0.0
    first = name == next(iter(recipe.chain)) and not recipe.model.path
    host = host_footprint(
        config, plan, assumed.node, step, total, trained, cache=float(recipe.data.cache_mb << 20), pinned=pinned,
        drawn=drawn, drawn_once=sum(counts.values()) if first else 0.0,
        heldout=settings.heldout_steps if settings.heldout_every else 0, background=settings.async_checkpoints,
    )  # fmt: skip
    seconds = step_seconds(done, trained, gpu, gpus, assumed.utilisation)
    days = seconds * settings.steps / DAY
    return StageCost(
        name=name, parameters=total, trained=trained, tokens=tokens, steps=settings.steps, flops=model, flops_done=done,
        memory=memory, host=host, fits=memory.peak <= assumed.usable * gpu.memory, seconds=seconds,
        mfu=model / (seconds * gpus * gpu.peak), days=days, dollars=days * DAY / HOUR * gpus * gpu.price, remedy="",
    )  # fmt: skip


def _tokens(settings: StageRecipe, kinds: dict[str, Kind]) -> float:
    """Tokens of all steps of a phase; of stage 0 those of its stills and clips."""
    if not isinstance(settings, VisionRecipe):
        return float(settings.steps * settings.global_batch_size * settings.context)
    mixture = settings.mixture or dict.fromkeys(kinds, 1 / len(kinds))
    return settings.steps * settings.pairs * sum(share * kinds[kind].tokens for kind, share in mixture.items())


def step_seconds(done: float, trained: float, gpu: Gpu, gpus: int, utilisation: float) -> float:
    """Seconds of a step: products at their share of the peak rate, the optimizer's update at memory bandwidth."""
    return done / (gpus * gpu.peak * utilisation) + UPDATE_PASSES * 4 * trained / gpus / gpu.bandwidth


def _contrastive(
    settings: VisionRecipe, config: Any, counts: dict[str, int], plan: Plan, kinds: dict[str, Kind], frame: int
) -> tuple[int, int, Footprint, tuple[float, float], int]:
    """Stage 0: the vision tower with its pooling head and the text tower, for one micro-batch and the vectors of all.

    frame: patches of the largest still.

    Returns:
        Parameters, trained parameters, memory, operations (of the model, performed) and visual tokens of a step.
    """
    micro = settings.micro_batches(plan.ranks)
    vision, e, text = config.vision_config, plan.element, _text_tower(settings, config)
    mixture = settings.mixture or dict.fromkeys(kinds, 1 / len(kinds))
    sizes = {k: kinds[k].tokens * kinds[k].visual * 4 for k in mixture}
    frames: list[tuple[int, int]] = []
    for kind, share in mixture.items():
        size = square(kinds[kind].patches * kinds[kind].encoded)
        frames += [size] * round(settings.pairs * share * sizes[kind] / kinds[kind].patches)
    patches = sum(height * width for height, width in frames)
    total = counts["visual"] + text.parameters + head_parameters(vision)
    held, read = patches / plan.ranks / micro, settings.pairs * text.length / plan.ranks / micro
    features, bucket = e * vision.hidden_size * held, reduced(total, plan)
    # The pooling head keeps keys, values and the weighted values in fp32. Its backward pass makes the gradients of the
    # weighted values and of the values, and a product of both.
    head = 3 * FP32 * vision.hidden_size * held
    kept = tower_layer(text, e) * read * text.num_hidden_layers + features + head
    if settings.checkpointing:  # of the tower; captions are short
        # When a chunk of frames is recomputed, captions and pooling head are done: only the gradient of the features is
        # left.
        several = held > FRAME_PATCHES
        chunk = tower_chunk(vision, e, held, frame) + (tower_gradients(vision, e) if several else bucket)
        layer = max(head + bucket, features + chunk - kept)
    else:
        # The layers, the patches as floats, and the input of the last norm.
        kept += held * (tower_layer(vision, e) * vision.num_hidden_layers + e * CHANNELS * vision.patch_size**2)
        kept += features
        layer = max(head, e * held * vision.intermediate_size) + bucket
    own = settings.pairs / plan.ranks
    vectors = (2 * own + settings.pairs) * vision.hidden_size * 2 * FP32  # this rank's, all captions' and the gradients
    memory = Footprint(
        **states(total, total, plan, text.vocabulary * text.hidden_size), activations=kept,
        pixels=plan.pixel * CHANNELS * vision.patch_size**2 * held * micro,
        layer=layer, logits=vectors + 3 * FP32 * min(own * settings.pairs, LOGITS),
    )  # fmt: skip
    once = flops.tower(vision, frames).total + flops.tower_layers(text, [text.length] * settings.pairs).total
    done = flops.TRAINING * once + (once if micro > 1 else 0)  # the pass that makes the vectors
    if settings.checkpointing:
        done += flops.frame_layers(vision, frames).total
    return total, total, memory, (flops.TRAINING * once, done), patches // 4


def head_parameters(vision: Any) -> int:
    """Parameters of the pooling head, with the temperature and the bias of the logits."""
    width, wide = vision.hidden_size, vision.intermediate_size
    return width + 4 * width * (width + 1) + 2 * width + 2 * width * wide + wide + width + 2


@dataclass(frozen=True)
class _TextTower:
    """The shape of stage 0's text tower, with the names of the vision tower's config; `out`: values of a caption."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocabulary: int
    length: int
    out: int

    @property
    def parameters(self) -> int:
        """Tables, layers, last norm and projection."""
        width, wide = self.hidden_size, self.intermediate_size
        layer = 4 * width * (width + 1) + 2 * width * wide + wide + width + 4 * width
        tables = (self.vocabulary + self.length) * width
        return tables + self.num_hidden_layers * layer + 2 * width + self.out * (width + 1)


def _text_tower(settings: VisionRecipe, config: Any) -> _TextTower:
    """The text tower of `text_model` if that exists, else one of the recipe's sizes."""
    out = config.vision_config.hidden_size
    if settings.text_model and (Path(settings.text_model) / "config.json").is_file():
        found = SiglipTextConfig.from_pretrained(settings.text_model)
        return _TextTower(
            found.hidden_size, found.num_hidden_layers, found.num_attention_heads, found.intermediate_size,
            found.vocab_size, found.max_position_embeddings, out,
        )  # fmt: skip
    vocabulary = SIGLIP_VOCABULARY if settings.text_model else config.text_config.vocab_size
    width, layers, heads = settings.text_width, settings.text_layers, settings.text_heads
    return _TextTower(width, layers, heads, 4 * width, vocabulary, settings.text_length, out)
