"""The memory of one rank's training step by component, computed from shapes; nothing is built or run.

Activations are counted as autograd keeps them: every tensor that an operation of a layer saves for its backward, once.
The states are DeepSpeed's (ZeRO, arXiv 1910.02054): weights in the precision of training, and master weights and two
moments in fp32. The memory of a step may peak at three times; `Footprint.peak` is the largest of them.
"""

from dataclasses import dataclass
from typing import Any

from keye.errors import RecipeError
from keye.model.heads import LOSS_CHUNK
from keye.model.vision import FRAME_PATCHES
from stages.distributed.engine import BUCKET

LIVE = 1_000_000_000  # parameters that ZeRO-3 gathers at once at most (stage3_max_live_parameters)
FP32 = 4
CHANNELS = 3


@dataclass(frozen=True)
class Plan:
    """The settings of a stage's training on one rank.

    element: bytes of a value in training (2 in bf16, 4 in fp32). zero: ZeRO's stage, over `ranks`. checkpointing,
    offload, mlp_tiles: as in a stage's recipe (`stages.distributed.activation_memory`). fused: whether norms keep their
    inputs alone and the optimizer creates no temporary tensors (true on a GPU). buckets: of gradients in reduction (two
    if reduction and backward overlap). live: parameters that ZeRO-3 gathers at most. pixel: bytes of a pixel in a
    batch. micro_batches: of a step; the pixels of all are on the device from its start, and the gradients of earlier
    ones stay during the forward passes of later ones. hpz: ranks that keep a second copy of the weights of ZeRO-3 among
    them; 1 = none.
    """

    element: int
    zero: int
    ranks: int
    checkpointing: bool = False
    offload: bool = False
    mlp_tiles: int = 1
    fused: bool = True
    buckets: int = 2
    live: int = LIVE
    pixel: int = 1
    micro_batches: int = 1
    hpz: int = 1


@dataclass(frozen=True)
class Share:
    """One rank's share of one micro-batch: tokens in the decoder, patches in the tower, labelled positions.

    frame: patches of the largest frame that passes through the tower undivided; 0 = at most `FRAME_PATCHES`.
    """

    tokens: int
    patches: int
    labels: int
    frame: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    gradients: those that stay after a backward pass. buckets: of gradients in reduction, during a backward pass.
    pixels: of all micro-batches of a step. activations: kept for the backward pass. layer: additional memory of the
    most expensive layer, or chunk of frames, while it is recomputed, with its gradients and a bucket in reduction.
    logits: of a chunk of the loss. step: temporary tensors of the optimizer. before: gradients of earlier
    micro-batches at the time of the loss. start: weights while they are read, before there is an optimizer.
    """

    weights: float
    gradients: float
    buckets: float
    optimizer: float
    activations: float
    pixels: float
    layer: float
    logits: float
    step: float
    before: float = 0.0
    start: float = 0.0

    @property
    def moments(self) -> dict[str, float]:
        """Time at which the memory may peak → bytes at that time."""
        always = self.weights + self.optimizer + self.pixels
        return {
            "at the start": self.start,
            "at the loss": always + self.before + self.activations + self.logits,
            "in the backward pass": always + self.gradients + self.buckets + self.activations + self.layer,
            "in the optimizer's step": always + self.gradients + self.step,
        }

    @property
    def peak(self) -> float:
        """The largest of the moments, in bytes."""
        return max(self.moments.values())

    @property
    def parts(self) -> dict[str, float]:
        """Component → bytes at the time of the peak; the sum is the peak."""
        moment = max(self.moments, key=self.moments.__getitem__)
        if moment == "at the start":
            return {"weights": self.start}
        parts = {"weights": self.weights, "optimizer": self.optimizer}
        gradients = self.before if moment == "at the loss" else self.gradients
        parts |= {"gradients": gradients} if gradients else {}
        if moment == "in the backward pass" and self.buckets:
            parts |= {"buckets": self.buckets}
        parts |= {"pixels": self.pixels} if moment == "in the optimizer's step" else {
            "activations": self.activations, "pixels": self.pixels
        }  # fmt: skip
        last = {"at the loss": ("logits", self.logits), "in the backward pass": ("one layer", self.layer)}
        name, size = last.get(moment, ("step", self.step))
        return {**parts, name: size}


def _bucket(trained: float, plan: Plan) -> float:
    """Elements of a bucket of gradients, see `engine.build`."""
    zero = max(plan.zero, 2) if plan.element < FP32 else plan.zero
    return min(BUCKET, trained) if zero and plan.ranks > 1 and plan.buckets else 0


def reduced(trained: float, plan: Plan) -> float:
    """Additional bytes of a bucket in reduction: its slices are joined, and in bf16 converted to fp32."""
    return _bucket(trained, plan) * (plan.element + (FP32 if plan.element < FP32 else 0))


def states(parameters: float, trained: float, plan: Plan, largest: float = 0.0) -> dict[str, float]:
    """weights, gradients, buckets, optimizer, step and start of `Footprint`.

    Args:
        parameters, trained: of the module, and those of them that train.
        plan: the settings of one rank.
        largest: elements of the largest parameter.
    """
    share, half = trained / plan.ranks, plan.element < FP32
    bucket = _bucket(trained, plan)
    zero = max(plan.zero, 2) if half else plan.zero  # as `engine.build`
    weights = min(parameters, parameters / plan.ranks + plan.live) if zero == 3 else parameters
    weights += parameters / plan.hpz if plan.hpz > 1 else 0
    held = share if zero >= 2 else trained
    # The optimizer works on flat fp32 gradients of its share. In bf16 training the fp32 sums are already flat;
    # otherwise they are copied. Without fusion the optimizer creates two more tensors of that size.
    flat = FP32 * (share if zero else trained)
    copied = 0 if half else flat
    # DeepSpeed frees the buckets after each backward pass, except that of ZeRO-3.
    stays = plan.element * bucket if zero == 3 else 0
    # ZeRO-3: a rank keeps its share of every parameter and has one at a time complete (`zero3.read_partitioned`).
    # ZeRO-1 and 2 copy the weights into one buffer, through the host if the GPU has no room for both.
    start = parameters / plan.ranks + largest if zero == 3 else parameters
    start += parameters / plan.hpz if plan.hpz > 1 else 0
    return {
        "weights": plan.element * weights,
        "gradients": FP32 * held,
        "buckets": plan.element * plan.buckets * bucket,
        "optimizer": 3 * FP32 * (share if zero else trained),
        "step": copied + stays + (0 if plan.fused else 2 * flat),
        "start": plan.element * start,
    }


def decoder_layer(text: Any, element: int, frozen: bool = False, fused: bool = True) -> tuple[float, float]:
    """Bytes per token that a decoder layer keeps: (norms, heads and attention; the gated MLP), as Qwen3 computes them.

    frozen: no weight trains, so only tensors for the gradient of the tokens are kept. fused: see `Plan`.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    # A norm keeps its input, in fp32 unless it is one kernel, and its result: without fusion for its own weight, and
    # after the weight for the next product.
    own = element if fused else FP32 if frozen else FP32 + element
    norm = own if frozen else own + element
    # Norms of heads precede attention, which itself keeps the rotated heads: the "next product" of above.
    heads = element + (own if text.model_type.startswith("qwen3") else 0)
    attention = heads * (queries + keys) + element * (keys + queries) + FP32 * text.num_attention_heads
    return 2 * norm * text.hidden_size + attention, (3 if frozen else 4) * element * text.intermediate_size


def tower_layer(vision: Any, element: int) -> float:
    """Bytes per patch that a layer of the tower keeps: two norms (input, result), q, k, v, their result, the MLP.

    Raises:
        RecipeError: a tower with another mixer than attention, or with a motion pathway.
    """
    if getattr(vision, "mixer", "attention") != "attention":
        raise RecipeError(
            f"the memory of a tower with mixer {vision.mixer!r} is not estimated; estimate it with attention"
        )
    if getattr(vision, "motion", None) is not None:
        raise RecipeError("the memory of a motion pathway is not estimated; estimate the recipe without it")
    return element * (8 * vision.hidden_size + 2 * vision.intermediate_size) + FP32 * vision.num_attention_heads


def activations(
    config: Any, plan: Plan, share: Share, frozen: bool = False, reduced: float = 0.0, tower_trains: bool = True
) -> tuple[float, float, float]:
    """Bytes (kept for the backward pass, in addition during the backward pass, for the loss).

    The second is that of the most expensive decoder layer, or of a chunk of frames: by then the backward pass has freed
    what the decoder kept. frozen: only the projector trains, as in the alignment. reduced: of a bucket, see `reduced`.
    tower_trains: false if projector and decoder train, and the tower does not.
    """
    text, e = config.text_config, plan.element
    kept, layer = _decoder(text, plan, frozen)
    kept, layer = kept * share.tokens * text.num_hidden_layers, layer * share.tokens
    fixed = frozen or not tower_trains
    seen, chunk = _tower(config, plan, share, fixed)
    several = plan.checkpointing and share.patches > FRAME_PATCHES
    chunk += (0.0 if fixed else tower_gradients(config.vision_config, e)) if several else reduced
    # The last norm, the labelled rows, and the visual tokens.
    norm = e if plan.fused else FP32 + e
    kept += seen + norm * text.hidden_size * share.tokens + e * text.hidden_size * share.labels
    return kept, max(layer + reduced, seen + chunk - kept), _loss(text, e, share.labels, frozen)


def _loss(text: Any, element: int, labels: int, frozen: bool) -> float:
    """Bytes of a chunk of the loss: logits, also in fp32, and the gradients of both."""
    rows = min(LOSS_CHUNK, labels)
    logits = rows * text.vocab_size * 2 * (element + FP32)
    if frozen:
        return logits
    # The gradient of the head's weight: the sum of earlier chunks stays while the next one runs; the chunk's own is
    # computed when only the gradient of its logits is left.
    head = element * text.vocab_size * text.hidden_size
    return max(logits + (head if labels > rows else 0), element * rows * text.vocab_size + head)


def _decoder(text: Any, plan: Plan, frozen: bool) -> tuple[float, float]:
    """Bytes per token: (kept by each layer, additional in the current layer with its widest gradients)."""
    e, hidden = plan.element, text.hidden_size
    rest, mlp = decoder_layer(text, e, frozen, plan.fused)
    at_once = mlp / plan.mlp_tiles
    gradients = 2 * e * text.intermediate_size / plan.mlp_tiles + 2 * e * hidden
    if not plan.checkpointing:
        return (rest + mlp, gradients) if plan.mlp_tiles == 1 else (rest, at_once + gradients)
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    attended = (e * head + FP32) * text.num_attention_heads
    if plan.offload:  # inputs wait in host memory; two are on their way
        return 0.0, rest + at_once + gradients + 2 * e * hidden
    return e * hidden + attended, rest - attended + at_once + gradients


def tower_chunk(vision: Any, element: int, patches: float, frame: float = 0) -> float:
    """Bytes of a chunk of `patches`, or of the largest frame, while it is recomputed.

    Each layer keeps what its backward pass reads. A frame of more than `FRAME_PATCHES` keeps the inputs of its layers
    and recomputes one layer at a time; its widest gradients are added.
    """
    pixels, layer = element * CHANNELS * vision.patch_size**2, tower_layer(vision, element)
    chunk = (pixels + layer * vision.num_hidden_layers) * min(patches, FRAME_PATCHES)
    if frame <= FRAME_PATCHES:
        return chunk
    inputs = element * vision.hidden_size * vision.num_hidden_layers
    gradients = element * (vision.hidden_size + vision.intermediate_size)
    return max(chunk, (pixels + inputs + layer + gradients) * frame)


def tower_gradients(vision: Any, element: int) -> float:
    """Bytes of the gradients of the tower's layers that autograd sums over chunks, before they reach a bucket."""
    width = vision.hidden_size
    return element * vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)


def _tower(config: Any, plan: Plan, share: Share, frozen: bool) -> tuple[float, float]:
    """Bytes of the frames: (kept, additional while a chunk of them passes through tower and projector)."""
    vision, e, patches = config.vision_config, plan.element, share.patches
    tokens = e * config.text_config.hidden_size * patches / 4
    features = e * vision.hidden_size  # a patch, between tower and projector
    pixels = e * CHANNELS * vision.patch_size**2
    projector = 4 * e * vision.hidden_size  # per patch: merged, norm, before and after the GELU; a quarter of the rows
    tower = e * vision.intermediate_size if frozen else pixels + tower_layer(vision, e) * vision.num_hidden_layers
    if plan.checkpointing:
        if not frozen:
            return tokens + features * patches, tower_chunk(vision, e, patches, share.frame)
        # The projector takes a complete frame. Its recomputation adds a gradient and the result.
        recomputed = projector + e * (vision.hidden_size + config.text_config.hidden_size / 4)
        chunk = max(tower * min(patches, FRAME_PATCHES), recomputed * max(min(patches, FRAME_PATCHES), share.frame))
        return tokens + features * patches, chunk
    if frozen:
        return tokens + projector * patches, tower * min(patches, FRAME_PATCHES)
    return (tower + projector) * patches, e * vision.intermediate_size * patches


def footprint(
    config: Any, plan: Plan, share: Share, parameters: float, trained: float, frozen: bool = False
) -> Footprint:
    """The memory of a language stage's step on one rank."""
    kept, layer, logits = activations(config, plan, share, frozen, reduced(trained, plan))
    held = states(parameters, trained, plan, config.text_config.vocab_size * config.text_config.hidden_size)
    zero = max(plan.zero, 2) if plan.element < FP32 else plan.zero
    return Footprint(
        **held,
        # From ZeRO-2 on (as bf16 runs) the buckets are freed after each backward pass; the fp32 sums stay.
        before=(held["gradients"] + (0 if zero >= 2 else held["buckets"])) * (plan.micro_batches > 1),
        activations=kept,
        pixels=plan.pixel * CHANNELS * config.vision_config.patch_size**2 * share.patches * plan.micro_batches,
        layer=layer,
        logits=logits,
    )
