"""How much memory one rank's training step takes, by component, from the shapes alone; nothing is built or run.

Activations are counted as autograd keeps them: every tensor that an operation of a layer saves for its backward, once.
The states are DeepSpeed's (ZeRO, arXiv 1910.02054): weights in the precision of training, and master weights and two
moments in fp32. A step has three moments at which its memory may peak; `Footprint.peak` is the largest.
"""

from dataclasses import dataclass
from typing import Any

from keye.model.keye import LOSS_CHUNK
from keye.model.vision import FRAME_PATCHES
from stages.distributed.engine import BUCKET

LIVE = 1_000_000_000  # parameters that ZeRO-3 gathers at once at most (stage3_max_live_parameters)
FP32 = 4
CHANNELS = 3


@dataclass(frozen=True)
class Plan:
    """How a stage is trained on one rank.

    element: bytes of a value in training (2 in bf16, 4 in fp32). zero: ZeRO's stage, over `ranks`. checkpointing,
    offload, mlp_tiles: as in a stage's recipe (`stages.distributed.activation_memory`). fused: whether the optimizer
    makes no tensors of its own (a GPU's). buckets: of gradients on their way to other ranks (two when reduction and
    backward overlap). live: parameters that ZeRO-3 holds whole. pixel: bytes of a pixel as it comes. micro_batches: of
    a step. The pixels of all of them are on the device from its beginning, and gradients of the earlier ones are held
    in the forward passes of the later. hpz: ranks that keep the weights of ZeRO-3 among them a second time; 1 = none.
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
    """What one rank holds of one micro-batch: tokens in the decoder, patches in the tower, labelled positions.

    frame: patches of the largest frame that passes through the tower whole; 0 = no more than `FRAME_PATCHES`.
    """

    tokens: int
    patches: int
    labels: int
    frame: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    gradients: those that stay when a backward pass is done. buckets: of gradients on their way to other ranks, held in
    a backward pass. pixels: of all micro-batches of a step. activations: what is kept for the backward pass. layer:
    what the most expensive layer, or chunk of frames, needs besides while it is run again, with its gradients and a
    bucket that is reduced meanwhile. logits: what a chunk of the loss needs. step: what the optimizer makes and drops.
    before: gradients that earlier micro-batches have left when the loss is computed.
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

    @property
    def moments(self) -> dict[str, float]:
        """When the memory may peak → how much is then held."""
        always = self.weights + self.optimizer + self.pixels
        return {
            "at the loss": always + self.before + self.activations + self.logits,
            "in the backward pass": always + self.gradients + self.buckets + self.activations + self.layer,
            "in the optimizer's step": always + self.gradients + self.step,
        }

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return max(self.moments.values())

    @property
    def parts(self) -> dict[str, float]:
        """Component → bytes at the moment of the peak; they add up to it."""
        moment = max(self.moments, key=self.moments.__getitem__)
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
    """Bytes that a bucket takes besides while it is reduced: its slices are joined, and in bf16 turned into fp32."""
    return _bucket(trained, plan) * (plan.element + (FP32 if plan.element < FP32 else 0))


def states(parameters: float, trained: float, plan: Plan) -> dict[str, float]:
    """weights, gradients, buckets, optimizer and step of `Footprint`, for so many parameters and so many that train."""
    share, half = trained / plan.ranks, plan.element < FP32
    bucket = _bucket(trained, plan)
    zero = max(plan.zero, 2) if half else plan.zero  # as `engine.build`
    weights = min(parameters, parameters / plan.ranks + plan.live) if zero == 3 else parameters
    weights += parameters / plan.hpz if plan.hpz > 1 else 0
    held = share if zero >= 2 else trained
    # The optimizer works on flat fp32 gradients of its share. The fp32 sums of bf16 training are flat already, others
    # are copied. Unfused it also makes two tensors of that size.
    flat = FP32 * (share if zero else trained)
    copied = 0 if half else flat
    # DeepSpeed frees the buckets after each backward pass; ZeRO-3's stays.
    stays = plan.element * bucket if zero == 3 else 0
    return {
        "weights": plan.element * weights,
        "gradients": FP32 * held,
        "buckets": plan.element * plan.buckets * bucket,
        "optimizer": 3 * FP32 * (share if zero else trained),
        "step": copied + stays + (0 if plan.fused else 2 * flat),
    }


def decoder_layer(text: Any, element: int, frozen: bool = False) -> tuple[float, float]:
    """Bytes a token that a decoder layer keeps: (norms, heads and attention; the gated MLP), as Qwen3 computes them.

    frozen: no weight trains, so that only what a gradient of the tokens needs is kept.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    # A norm keeps its input in fp32, and for its own weight and the next product the result without and with it.
    norm = FP32 if frozen else FP32 + 2 * element
    # Norms of heads stand before attention, which itself keeps the rotated heads: the "next product" of above.
    heads = element + (FP32 + (0 if frozen else element) if text.model_type.startswith("qwen3") else 0)
    attention = heads * (queries + keys) + element * (keys + queries) + FP32 * text.num_attention_heads
    return 2 * norm * text.hidden_size + attention, (3 if frozen else 4) * element * text.intermediate_size


def tower_layer(vision: Any, element: int) -> float:
    """Bytes a patch that a layer of the tower keeps: two norms (input, result), q, k, v, their result, the MLP."""
    return element * (8 * vision.hidden_size + 2 * vision.intermediate_size) + FP32 * vision.num_attention_heads


def activations(
    config: Any, plan: Plan, share: Share, frozen: bool = False, reduced: float = 0.0
) -> tuple[float, float, float]:
    """(kept for the backward, needed besides in the backward pass, needed for the loss), in bytes.

    Besides is what the most expensive decoder layer needs, or a chunk of frames: by then the backward pass has used up
    what the decoder kept. frozen: only the projector trains, as in the alignment. reduced: of a bucket, see `reduced`.
    """
    text, e = config.text_config, plan.element
    kept, layer = _decoder(text, plan, frozen)
    kept, layer = kept * share.tokens * text.num_hidden_layers, layer * share.tokens
    seen, chunk = _tower(config, plan, share, frozen)
    several = plan.checkpointing and share.patches > FRAME_PATCHES
    chunk += (0.0 if frozen else tower_gradients(config.vision_config, e)) if several else reduced
    # The last norm, the rows that are labelled, and the tokens that stand for frames.
    kept += seen + (FP32 + e) * text.hidden_size * share.tokens + e * text.hidden_size * share.labels
    return kept, max(layer + reduced, seen + chunk - kept), _loss(text, e, share.labels, frozen)


def _loss(text: Any, element: int, labels: int, frozen: bool) -> float:
    """Bytes that a chunk of the loss needs: logits, in fp32 as well, and the gradients of both."""
    rows = min(LOSS_CHUNK, labels)
    logits = rows * text.vocab_size * 2 * (element + FP32)
    if frozen:
        return logits
    # The gradient of the head's weight: of the earlier chunks it is held while the next one runs; that of the chunk
    # itself is made when of its logits only their gradient is left.
    head = element * text.vocab_size * text.hidden_size
    return max(logits + (head if labels > rows else 0), element * rows * text.vocab_size + head)


def _decoder(text: Any, plan: Plan, frozen: bool) -> tuple[float, float]:
    """Bytes a token: (that each layer keeps, that the layer at work needs besides, with its widest gradients)."""
    e, hidden = plan.element, text.hidden_size
    rest, mlp = decoder_layer(text, e, frozen)
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
    """Bytes that a chunk of so many patches, or the largest frame, needs while it is computed again as a whole.

    Each layer keeps what its backward pass reads. A frame of more than `FRAME_PATCHES` keeps the inputs of its layers,
    and one layer at a time is computed again; its widest gradients come on top.
    """
    pixels, layer = element * CHANNELS * vision.patch_size**2, tower_layer(vision, element)
    chunk = (pixels + layer * vision.num_hidden_layers) * min(patches, FRAME_PATCHES)
    if frame <= FRAME_PATCHES:
        return chunk
    inputs = element * vision.hidden_size * vision.num_hidden_layers
    gradients = element * (vision.hidden_size + vision.intermediate_size)
    return max(chunk, (pixels + inputs + layer + gradients) * frame)


def tower_gradients(vision: Any, element: int) -> float:
    """Bytes of the gradients of the tower's layers that autograd adds up over chunks, before they reach a bucket."""
    width = vision.hidden_size
    return element * vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)


def _tower(config: Any, plan: Plan, share: Share, frozen: bool) -> tuple[float, float]:
    """Bytes of the frames: (kept, needed while a chunk of them passes through tower and projector)."""
    vision, e, patches = config.vision_config, plan.element, share.patches
    tokens = e * config.text_config.hidden_size * patches / 4
    features = e * vision.hidden_size  # a patch, between tower and projector
    pixels = e * CHANNELS * vision.patch_size**2
    projector = 4 * e * vision.hidden_size  # a patch: merged, normed, before and after the GELU, a quarter as often
    tower = e * vision.intermediate_size if frozen else pixels + tower_layer(vision, e) * vision.num_hidden_layers
    if plan.checkpointing:
        chunk = max(tower, projector) * min(patches, FRAME_PATCHES)
        if not frozen:
            chunk = max(chunk, tower_chunk(vision, e, patches, share.frame))
        return tokens + features * patches, chunk
    if frozen:
        return tokens + projector * patches, tower * min(patches, FRAME_PATCHES)
    return (tower + projector) * patches, e * vision.intermediate_size * patches


def footprint(
    config: Any, plan: Plan, share: Share, parameters: float, trained: float, frozen: bool = False
) -> Footprint:
    """The memory of a language stage's step on one rank."""
    kept, layer, logits = activations(config, plan, share, frozen, reduced(trained, plan))
    held = states(parameters, trained, plan)
    zero = max(plan.zero, 2) if plan.element < FP32 else plan.zero
    return Footprint(
        **held,
        # From ZeRO-2 on, as which bf16 runs, the buckets are given back after each backward pass; the fp32 sums stay.
        before=(held["gradients"] + (0 if zero >= 2 else held["buckets"])) * (plan.micro_batches > 1),
        activations=kept,
        pixels=plan.pixel * CHANNELS * config.vision_config.patch_size**2 * share.patches * plan.micro_batches,
        layer=layer,
        logits=logits,
    )
