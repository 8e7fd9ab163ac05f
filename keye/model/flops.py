"""How many floating-point operations a forward pass takes, from the config and the sizes alone.

A multiplication and an addition count as two. `linear` is what grows with the number of tokens: every matrix product
with a weight. `quadratic` is what grows with the square of a segment: scores and their products with the values, for
the pairs that attend to each other. Norms, activations and rotations are not counted, as usual: they are below 1 %. A
training step takes three times as many, whether or not activations are recomputed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from keye.hyperzzw.cost import mixer_operations
from keye.motion.cost import motion_operations
from keye.motion.settings import MotionSettings

TRAINING = 3  # forward, gradients of the activations, gradients of the weights


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass that grow with the tokens, and with the square of each segment."""

    linear: int = 0
    quadratic: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.quadratic

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.quadratic + other.quadratic)


def attention_pairs(lengths: Iterable[int], causal: bool) -> int:
    """Pairs of a query and a key that attend to each other inside segments of these lengths."""
    return sum(length * (length + 1) // 2 if causal else length * length for length in lengths)


def tower_layers(vision: Any, patches: Iterable[int]) -> Flops:
    """Layers with attention (a KeyeVisionConfig's, or a text tower's) over frames with these numbers of patches."""
    patches = list(patches)
    width = vision.hidden_size
    weights = 4 * width * width + 2 * width * vision.intermediate_size
    layers = vision.num_hidden_layers
    return Flops(2 * sum(patches) * weights * layers, 4 * width * attention_pairs(patches, causal=False) * layers)


def frame_layers(vision: Any, frames: Iterable[tuple[int, int]]) -> Flops:
    """The tower's layers over frames of (height, width) patches in one call, with attention or another mixer."""
    frames = list(frames)
    patches = [height * width for height, width in frames]
    if vision.mixer == "attention":
        return tower_layers(vision, patches)
    linear, quadratic = mixer_operations(vision.hidden_size, frames)
    mlp = 2 * sum(patches) * 2 * vision.hidden_size * vision.intermediate_size
    return Flops((linear + mlp) * vision.num_hidden_layers, quadratic * vision.num_hidden_layers)


def tower(vision: Any, frames: Iterable[tuple[int, int]]) -> Flops:
    """The complete tower over frames of (height, width) patches: patch embedding, layers and the motion pathway."""
    frames = list(frames)
    patches = sum(height * width for height, width in frames)
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    motion = getattr(vision, "motion", None)
    if motion is not None:
        embedding += len(frames) * motion_operations(MotionSettings.of(motion))
    return Flops(embedding) + frame_layers(vision, frames)


def projector(vision_width: int, hidden_size: int, patches: int) -> Flops:
    """2×2 patches → one token: two linear layers on a quarter of the patches."""
    merged = 4 * vision_width
    return Flops(2 * (patches // 4) * (merged * merged + merged * hidden_size))


def decoder(text: Any, lengths: Iterable[int]) -> Flops:
    """The decoder's layers (a transformers config with gated MLPs) over documents of these lengths, packed or not."""
    lengths = list(lengths)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    layers = text.num_hidden_layers
    return Flops(2 * sum(lengths) * weights * layers, 4 * queries * attention_pairs(lengths, causal=True) * layers)


def head(text: Any, rows: int) -> Flops:
    """Logits of `rows` positions."""
    return Flops(2 * rows * text.hidden_size * text.vocab_size)


def forward(config: Any, frames: Iterable[tuple[int, int]], lengths: Iterable[int], rows: int) -> Flops:
    """A forward pass of the complete model.

    Args:
        config: a KeyeConfig.
        frames: (height, width) in patches of every frame and image.
        lengths: tokens of every document, visual tokens included.
        rows: positions that get logits; in training those with a label.
    """
    frames = list(frames)
    vision, text = config.vision_config, config.text_config
    patches = sum(height * width for height, width in frames)
    visual = tower(vision, frames) + projector(vision.hidden_size, text.hidden_size, patches)
    return visual + decoder(text, lengths) + head(text, rows)


def training_step(
    config: Any,
    frames: Iterable[tuple[int, int]],
    lengths: Iterable[int],
    rows: int,
    tower_trains: bool = True,
    decoder_trains: bool = True,
) -> int:
    """Operations of a training step of a KeyeConfig whose projector trains; arguments as for `forward`.

    A frozen part has no gradients of weights; a frozen tower has no gradients, because nothing below it trains.
    Products of scores have no weights: they take three times the forward pass wherever gradients flow.
    """
    frames, lengths = list(frames), list(lengths)
    vision, text = config.vision_config, config.text_config
    patches = sum(height * width for height, width in frames)
    visual = tower(vision, frames).total * (TRAINING if tower_trains else 1)
    merged = projector(vision.hidden_size, text.hidden_size, patches).total * (TRAINING if tower_trains else 2)
    language = decoder(text, lengths) + head(text, rows)
    return visual + merged + language.linear * (TRAINING if decoder_trains else 2) + language.quadratic * TRAINING
