"""What a recipe costs before anything runs: parameters, memory a GPU, operations, time, money, and whether it fits.

Nothing is measured here: shapes come from the config, operations from `keye.model.flops`, memory from
`stages.cost.footprint` (of a GPU) and `stages.cost.host_memory` (of a node), devices from `stages.cost.gpus`. What a
recipe does not say is assumed, and every assumption is a field of `Assumptions`, `Node` or `Kind`, so that it is
printed with the result.
"""

import dataclasses
import math
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
from stages.losses import LOGITS
from stages.recipe import Recipe, StageRecipe, VisionRecipe, stage_of
from stages.recipe_checks import KINDS

DAY, HOUR = 86400.0, 3600.0
SIGLIP_VOCABULARY = 32_000  # tokens of SigLIP's tokenizer
UPDATE_PASSES = 7  # fp32 values of a parameter that AdamW moves: gradient, master, two moments read, three written


@dataclass(frozen=True)
class Kind:
    """What a sample of one kind is like, on average.

    tokens: of a document, visual ones included. visual: share of them that are visual. patches: of a frame or still.
    labels: share of the tokens that are learnt.
    """

    tokens: float
    visual: float
    patches: float
    labels: float


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says.

    utilisation: share of the peak rate at which matrix products run, those of recomputed layers included. usable: share
    of the memory that tensors may fill; the rest is the driver's, the libraries' and the allocator's gaps. kinds:
    samples, where they are known; the others come from the recipe's budgets (`kinds_of`). node: of the hosts.
    """

    utilisation: float = 0.4
    usable: float = 0.92
    kinds: dict[str, Kind] = field(default_factory=dict)
    node: Node = Node()


@dataclass(frozen=True)
class Work:
    """What one optimizer step trains on, over all ranks: documents' tokens, frames' sides in patches, labels."""

    documents: list[int]
    frames: list[tuple[int, int]]
    labels: int

    @property
    def patches(self) -> int:
        return sum(height * width for height, width in self.frames)


@dataclass(frozen=True)
class StageCost:
    """One phase of the chain. flops: of a step over all ranks, `model` without what is recomputed, `done` with it.

    memory: of a GPU. host: of a node.
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
    mend: str


def estimate(recipe: Recipe, gpu: Gpu, gpus: int, assumed: Assumptions | None = None) -> list[StageCost]:
    """The cost of every phase of a recipe's chain on so many devices.

    Raises:
        RecipeError: a number of devices that a stage's packs or sequence groups cannot be shared by.
    """
    assumed = assumed or Assumptions()
    config = config_of(recipe)
    counts = parameters_of(config)
    return [_phase(name, recipe, config, counts, gpu, gpus, assumed) for name in recipe.chain]


def config_of(recipe: Recipe) -> KeyeConfig:
    """The model's config: of its directory where that is there, else of the preset."""
    path = Path(recipe.model.path)
    if recipe.model.path and (path / "config.json").is_file():
        return KeyeConfig.from_pretrained(path)
    own = not (recipe.model.path or recipe.model.tokenizer)
    return KeyeConfig.preset(recipe.model.preset, **({"vocab_size": recipe.model.vocab_size} if own else {}))


def parameters_of(config: KeyeConfig) -> dict[str, int]:
    """Parameters of the tower, the projector and the rest (`language`), counted on a model without any memory."""
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    parts = {"visual": 0, "projector": 0, "language": 0}
    for name, parameter in model.named_parameters():
        part = name.removeprefix("model.").partition(".")[0]
        parts[part if part in parts else "language"] += parameter.numel()
    return parts


def kinds_of(recipe: Recipe, told: StageRecipe) -> dict[str, Kind]:
    """Samples as the recipe's budgets let one expect them, where nobody has looked at the data.

    A clip fills half of what the encoder may spend on it or the context has room for, with frames midway between its
    smallest and largest (as ratios go); a still has 500 tokens, a photograph of 600 × 650 pixels, where its limits let
    it, and is talked about in 200; a text is a quarter of the context.
    """
    encoder = {**recipe.processor.encoder, **told.encoder}
    low, high = encoder.get("min_tokens_per_frame", 48), encoder.get("max_tokens_per_frame", 768)
    frame = (low * high) ** 0.5
    context = told.context if told.limit is not None else math.inf  # stage 0 has none
    clip = min(encoder.get("max_tokens", 75_000), context) / 2
    stills = recipe.processor.image
    still = min(max(500.0, stills.get("min_tokens", 4)), stills.get("max_tokens", 20_480), context / 2)
    words = min(200.0, context / 4)
    mark = 8.0  # tokens that say a frame's time
    return {
        "video": Kind(clip * (1 + mark / frame) + words, clip / (clip * (1 + mark / frame) + words), 4 * frame, 0.1),
        "image": Kind(still + words, still / (still + words), 4 * still, 0.25),
        "text": Kind(told.context / 4, 0.0, 4.0, 0.9),
    }


def largest_frame(recipe: Recipe, told: StageRecipe, frames: bool = True) -> int:
    """Patches of the largest still or frame that the recipe's limits admit in a stage; a rank may meet it in any step.

    frames: whether the stage has clips.
    """
    still = recipe.processor.image.get("max_tokens", 20_480)
    encoder = {**recipe.processor.encoder, **told.encoder}
    largest = max(still, encoder.get("max_tokens_per_frame", 768) if frames else 0)
    # A sequence group cuts frames larger than a chunk among its ranks.
    return round(4 * min(largest, told.context if told.limit is not None else math.inf) / told.sequence_parallel)


def work_of(told: StageRecipe, kinds: dict[str, Kind]) -> Work:
    """An average step of a language stage: its tokens shared out by the mixture, in whole documents and frames."""
    tokens = told.global_batch_size * told.context
    mixture = told.mixture or dict.fromkeys(KINDS, 1 / len(KINDS))
    documents: list[int] = []
    frames: list[tuple[int, int]] = []
    labels = 0.0
    for name, share in mixture.items():
        kind = kinds[name]
        count = max(1, round(share * tokens / kind.tokens)) if share else 0
        documents += [round(share * tokens / count)] * count if count else []
        patches = 4 * share * tokens * kind.visual
        frames += [_sides(kind.patches)] * round(patches / kind.patches)
        labels += share * tokens * kind.labels
    return Work(documents, frames, round(labels))


def _sides(patches: float) -> tuple[int, int]:
    """Even sides of a square frame of about so many patches."""
    side = max(2, 2 * round(patches**0.5 / 2))
    return side, side


def step_flops(config: Any, name: str, work: Work, told: StageRecipe) -> tuple[float, float]:
    """(of the model, done) operations of a step: the second counts what is computed again, the first does not.

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
    again = head.total  # the loss is always taken in chunks that are computed twice
    product = 2 * sum(work.documents) * text.hidden_size * text.intermediate_size * text.num_hidden_layers
    if told.checkpointing:
        # Not the last product of what is computed again, whose result nobody waits for: of the MLPs, of the projector.
        last = product + 2 * (work.patches // 4) * 4 * vision.hidden_size * text.hidden_size
        again += decoder.linear + projector.total + (0 if frozen else tower.linear) - last
        # Attention's results are kept, unless they would have to wait in host memory.
        again += decoder.quadratic + (0 if frozen else tower.quadratic) if told.offload else 0
    if told.mlp_tiles > 1:
        # Two of a tile's three products; where layers are computed again all three besides, but for the last tile.
        again += product * (3 * (told.mlp_tiles - 1) / told.mlp_tiles if told.checkpointing else 2)
    return model, model + again


def _phase(
    name: str, recipe: Recipe, config: Any, counts: dict[str, int], gpu: Gpu, gpus: int, assumed: Assumptions
) -> StageCost:
    stage = stage_of(name)
    told = getattr(recipe, stage)  # what can be set, of which a context in between is made

    def reckoned(changes: dict[str, Any]) -> StageCost | None:
        other = dataclasses.replace(recipe, **{stage: dataclasses.replace(told, **changes)})
        try:
            return _reckon(name, other, other.chain[name], config, counts, gpu, gpus, assumed)
        except RecipeError:
            return None

    made = _reckon(name, recipe, recipe.chain[name], config, counts, gpu, gpus, assumed)
    if made.fits:
        return made
    for changes in _mends(told, gpus):
        if (other := reckoned(changes)) and other.fits:
            for key in list(changes):  # what turns out not to be needed is not asked for
                fewer = {k: v for k, v in changes.items() if k != key}
                changes = fewer if (other := reckoned(fewer)) and other.fits else changes
            mend = " ".join(f"--set {stage}.{key}={str(value).lower()}" for key, value in changes.items())
            return dataclasses.replace(made, mend=mend)
    return dataclasses.replace(made, mend="no setting of the recipe makes it fit; take a larger GPU, or more of them")


def _mends(told: StageRecipe, gpus: int) -> list[dict[str, Any]]:
    """Changes that save memory, roughly the cheapest first, each on top of the ones before."""
    changes: dict[str, Any] = {}
    tried = []
    if not told.checkpointing:
        changes = {**changes, "checkpointing": True}
        tried.append(changes)
    if not isinstance(told, VisionRecipe):
        if told.mlp_tiles == 1:
            changes = {**changes, "mlp_tiles": 4}
            tried.append(changes)
    if isinstance(told, VisionRecipe):
        micro = told.pairs // gpus // told.micro_batches(gpus)
        while micro % 2 == 0:
            micro //= 2
            changes = {**changes, "micro_pairs": micro}
            tried.append(changes)
    for zero in range(told.zero + 1, 4):
        changes = {**changes, "zero": zero}
        tried.append(changes)
    if not (told.offload or isinstance(told, VisionRecipe)):
        changes = {**changes, "offload": True}
        tried.append(changes)
    if isinstance(told, VisionRecipe):  # fewer negatives a pair, so this one changes what is learnt
        pairs = told.pairs
        while pairs % (2 * gpus * changes.get("micro_pairs", 1)) == 0:
            pairs //= 2
            tried.append({**changes, "pairs": pairs})
        return tried
    sequence = told.sequence_parallel
    while sequence * 2 <= gpus:
        sequence *= 2
        tried.append({**changes, "sequence_parallel": sequence})
    return tried


def _reckon(
    name: str, recipe: Recipe, told: StageRecipe, config: Any, counts: dict[str, int], gpu: Gpu, gpus: int,
    assumed: Assumptions,
) -> StageCost:  # fmt: skip
    kinds = {**kinds_of(recipe, told), **assumed.kinds}
    element = 4 if recipe.precision == "fp32" else 2
    plan = Plan(element, told.zero, gpus, told.checkpointing, told.offload, told.mlp_tiles, hpz=told.hpz)
    if isinstance(told, VisionRecipe):
        frame = largest_frame(recipe, told, frames=told.mixture.get("video", not told.mixture) > 0)
        total, trained, memory, (model, done), tokens = _contrastive(told, config, counts, plan, kinds, frame)
        step, pinned, drawn = Share(0, 4 * tokens, 0), 0.0, total - counts["visual"]
    else:
        ranks = gpus // told.sequence_parallel
        if gpus % told.sequence_parallel or told.global_batch_size % ranks:
            raise RecipeError(
                f"{name}: {told.global_batch_size} packs, each on {told.sequence_parallel} ranks, cannot be shared by "
                f"{gpus} GPUs; give a number that divides {told.global_batch_size * told.sequence_parallel}"
            )
        total = sum(counts.values())
        frozen = stage_of(name) == "alignment"
        trained = counts["projector"] if frozen else total
        work, tokens = work_of(told, kinds), told.global_batch_size * told.context
        parts = told.global_batch_size * told.sequence_parallel
        frame = largest_frame(recipe, told)
        share = Share(tokens // parts, work.patches // parts, work.labels // parts, frame)
        plan = dataclasses.replace(plan, micro_batches=told.global_batch_size // ranks)
        memory = footprint(config, plan, share, total, trained, frozen)
        model, done = step_flops(config, name, work, told)
        step, pinned, drawn = Share(tokens, work.patches, work.labels), share.tokens, 0.0
    first = name == next(iter(recipe.chain)) and not recipe.model.path
    host = host_footprint(
        config, plan, assumed.node, step, total, trained, cache=float(recipe.data.cache_mb << 20), pinned=pinned,
        drawn=drawn, drawn_once=sum(counts.values()) if first else 0.0,
        heldout=told.heldout_steps if told.heldout_every else 0, background=told.async_checkpoints,
    )  # fmt: skip
    seconds = step_seconds(done, trained, gpu, gpus, assumed.utilisation)
    days = seconds * told.steps / DAY
    return StageCost(
        name=name, parameters=total, trained=trained, tokens=tokens, steps=told.steps, flops=model, flops_done=done,
        memory=memory, host=host, fits=memory.peak <= assumed.usable * gpu.memory, seconds=seconds,
        mfu=model / (seconds * gpus * gpu.peak), days=days, dollars=days * DAY / HOUR * gpus * gpu.price, mend="",
    )  # fmt: skip


def step_seconds(done: float, trained: float, gpu: Gpu, gpus: int, utilisation: float) -> float:
    """Matrix products at their share of the peak rate, and the optimizer's update at the memory's bandwidth."""
    return done / (gpus * gpu.peak * utilisation) + UPDATE_PASSES * 4 * trained / gpus / gpu.bandwidth


def _contrastive(
    told: VisionRecipe, config: Any, counts: dict[str, int], plan: Plan, kinds: dict[str, Kind], frame: int
) -> tuple[int, int, Footprint, tuple[float, float], int]:
    """Stage 0: the tower with its pooling head and the text tower; a micro-batch is held at once, and all vectors.

    frame: patches of the largest still.
    """
    micro = told.micro_batches(plan.ranks)
    vision, e, text = config.vision_config, plan.element, _text_tower(told, config)
    mixture = told.mixture or dict.fromkeys(kinds, 1 / len(kinds))
    sizes = {k: kinds[k].tokens * kinds[k].visual * 4 for k in mixture}
    frames: list[tuple[int, int]] = []
    for kind, share in mixture.items():
        frames += [_sides(kinds[kind].patches)] * round(told.pairs * share * sizes[kind] / kinds[kind].patches)
    patches = sum(height * width for height, width in frames)
    total = counts["visual"] + text.parameters + head_parameters(vision)
    held, read = patches / plan.ranks / micro, told.pairs * text.length / plan.ranks / micro
    features, bucket = e * vision.hidden_size * held, reduced(total, plan)
    # The pooling head keeps keys, values and the weighted values in fp32. Its backward pass makes the gradients of the
    # weighted values and of the values, and a product of both.
    head = 3 * FP32 * vision.hidden_size * held
    kept = tower_layer(text, e) * read * text.num_hidden_layers + features + head
    if told.checkpointing:  # of the tower; captions are short
        # When a chunk of frames runs again, captions and pooling head are through: what is left is the gradient of the
        # features.
        several = held > FRAME_PATCHES
        chunk = tower_chunk(vision, e, held, frame) + (tower_gradients(vision, e) if several else bucket)
        layer = max(head + bucket, features + chunk - kept)
    else:
        # The layers, the patches as floats, and the input of the last norm.
        kept += held * (tower_layer(vision, e) * vision.num_hidden_layers + e * CHANNELS * vision.patch_size**2)
        kept += features
        layer = max(head, e * held * vision.intermediate_size) + bucket
    own = told.pairs / plan.ranks
    vectors = (2 * own + told.pairs) * vision.hidden_size * 2 * FP32  # this rank's, all captions', and the gradients
    memory = Footprint(
        **states(total, total, plan), activations=kept,
        pixels=plan.pixel * CHANNELS * vision.patch_size**2 * held * micro,
        layer=layer, logits=vectors + 3 * FP32 * min(own * told.pairs, LOGITS),
    )  # fmt: skip
    once = flops.tower(vision, frames).total + flops.tower_layers(text, [text.length] * told.pairs).total
    done = flops.TRAINING * once + (once if micro > 1 else 0)  # the pass that makes the vectors
    if told.checkpointing:
        done += flops.tower_layers(vision, [height * width for height, width in frames]).total
    return total, total, memory, (flops.TRAINING * once, done), patches // 4


def head_parameters(vision: Any) -> int:
    """Parameters of the pooling head, with the temperature and the bias of the logits."""
    width, wide = vision.hidden_size, vision.intermediate_size
    return width + 4 * width * (width + 1) + 2 * width + 2 * width * wide + wide + width + 2


@dataclass(frozen=True)
class _TextTower:
    """The shape of stage 0's text tower, named as the vision tower's config is; `out` values of a caption."""

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


def _text_tower(told: VisionRecipe, config: Any) -> _TextTower:
    """The text tower of `text_model` where that is there, else one of the recipe's sizes."""
    out = config.vision_config.hidden_size
    if told.text_model and (Path(told.text_model) / "config.json").is_file():
        found = SiglipTextConfig.from_pretrained(told.text_model)
        return _TextTower(
            found.hidden_size, found.num_hidden_layers, found.num_attention_heads, found.intermediate_size,
            found.vocab_size, found.max_position_embeddings, out,
        )  # fmt: skip
    vocabulary = SIGLIP_VOCABULARY if told.text_model else config.text_config.vocab_size
    width = told.text_width
    return _TextTower(width, told.text_layers, told.text_heads, 4 * width, vocabulary, told.text_length, out)
