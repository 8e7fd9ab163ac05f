"""What the parts on kernels and layers measure: shapes, packs of real plans, and every setting of the layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from keye.model import flops
from keye.model.attention import available, choose
from keye.model.config import KeyeConfig
from scripts.bench.gpu.plans import DecodedPlan, frames_of
from scripts.bench.model import layers as layers_of

Frames = list[tuple[int, int]]
COMPILER = "aot_eager"  # of small shapes
MEASURED = ("flops", "count", "kept", "peak", "times", "failure")  # fields of a Row that a measurement fills in


@dataclass(frozen=True)
class Sizes:
    """What is measured: shapes, packings and repetitions."""

    config: KeyeConfig
    frames: dict[str, Frames]
    documents: dict[str, list[int]]
    matrices: tuple[tuple[int, int, int], ...]
    rounds: int
    dtype: torch.dtype
    compiler: str


def sizes_of(small: bool, plans: Sequence[DecodedPlan]) -> Sizes:
    """The released shapes over 8,192 tokens in bfloat16, or tiny ones in float32; frames are those of the plans."""
    if small:
        config = KeyeConfig.preset("tiny", vocab_size=300, num_hidden_layers=2)
        config.vision_config.num_hidden_layers = 2
        documents, frames = {"3 documents": [50, 30, 16]}, {"up to 96 patches": frames_up_to(plans, 96)}
        return Sizes(config, frames, documents, ((128,) * 3,), 2, torch.float32, COMPILER)
    config = KeyeConfig.preset("keye_8b", num_hidden_layers=4)
    config.vision_config.num_hidden_layers = 6
    return Sizes(
        config,
        {f"up to {patches:,} patches": frames_up_to(plans, patches) for patches in (8192, 32_768)},
        {"8 documents": [3000, 2200, 1300, 800, 492, 256, 100, 44], "1 document": [8192]},
        ((8192,) * 3, (16_384, 8192, 8192)),
        12,
        torch.bfloat16,
        "inductor",
    )


def frames_up_to(plans: Sequence[DecodedPlan], patches: int) -> Frames:
    """(height, width) of the plans' frames in order, repeated, as many as `patches` hold."""
    found, total = [], 0
    for _, size in frames_of(plans):
        total += size[0] * size[1]
        if total > patches:
            return found
        found.append(size)
    return found


@dataclass
class Row:
    """A stack of layers in one setting: what it took, or why it did not run.

    kept, peak: MB a layer that a forward pass leaves for the backward pass, and the most above the weights in a step.
    """

    name: str
    setting: str
    make: Callable[[], layers_of.Stack]
    compiled: bool = False
    recompute: bool = False
    flops: int = 0
    count: int = 1
    kept: float = 0.0
    peak: float = 0.0
    times: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def took(self) -> float:
        """Median seconds of forward and backward of all layers."""
        return median(self.times)

    @property
    def rate(self) -> float:
        """FLOP/s of the model's own operations; recomputed ones do not count."""
        return flops.TRAINING * self.flops / self.took

    def values(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        return {name: getattr(self, name) for name in MEASURED}

    def restore(self, values: dict[str, Any]) -> None:
        """Take what `values` returned."""
        for name in MEASURED:
            setattr(self, name, values[name])


def groups(sizes: Sizes, device: torch.device) -> list[list[Row]]:
    """Rows that are timed in turn: one list for each kind of layer and packing, the most telling first."""
    vision, text = sizes.config.vision_config, sizes.config.text_config
    found = []
    for number, (documents, frames) in enumerate(zip(sizes.documents.items(), sizes.frames.items(), strict=True)):

        def decoder(backend: str, lengths: list[int] = documents[1], fused: bool = True) -> layers_of.Stack:
            return layers_of.our_decoder(text, lengths, device, sizes.dtype, backend, fused)

        def their_decoder(lengths: list[int] = documents[1]) -> layers_of.Stack:
            return layers_of.their_decoder(text, lengths, device, sizes.dtype)

        def tower(backend: str, frames: Frames = frames[1]) -> layers_of.Stack:
            return layers_of.our_vision(vision, frames, device, sizes.dtype, backend)

        def their_tower(frames: Frames = frames[1]) -> layers_of.Stack:
            return layers_of.their_vision(vision, frames, device, sizes.dtype)

        shared = text.num_attention_heads // text.num_key_value_heads
        width = vision.hidden_size // vision.num_attention_heads
        names = fitting(device, sizes.dtype, text.head_dim, shared), fitting(device, sizes.dtype, width, 1)
        found.append(_settings(f"decoder, {documents[0]}", decoder, their_decoder, names[0], number == 0))
        if number == 0:
            best = names[0][0]
            plain = Row(found[-1][0].name, f"ours, {best}, transformers' norms", partial(decoder, best, fused=False))
            found[-1].insert(len(names[0]), plain)
        found.append(_settings(f"vision, {frames[0]}", tower, their_tower, names[1], number == 0))
    return found


def fitting(device: torch.device, dtype: torch.dtype, head_dim: int, shared: int) -> list[str]:
    """The backends that compute this kind of attention themselves, best first, without the plain one."""
    names = [name for name in available(device) if name != "plain"]
    return [name for name in names if choose(name, device, dtype, head_dim, shared) == name]


def _settings(
    name: str,
    ours: Callable[[str], layers_of.Stack],
    theirs: Callable[[], layers_of.Stack],
    names: list[str],
    all_: bool,
) -> list[Row]:
    best = names[0]
    rows = [Row(name, f"ours, {backend}", lambda backend=backend: ours(backend)) for backend in names]
    rows += [
        Row(name, f"ours, {best}, compiled", lambda: ours(best), compiled=True),
        Row(name, "Qwen2.5-VL", theirs),
        Row(name, "Qwen2.5-VL, compiled", theirs, compiled=True),
    ]
    if all_:
        rows += [
            Row(name, f"ours, {best}, checkpointing", lambda: ours(best), recompute=True),
            Row(name, f"ours, {best}, compiled, checkpointing", lambda: ours(best), compiled=True, recompute=True),
            Row(name, "Qwen2.5-VL, checkpointing", theirs, recompute=True),
        ]
    return rows
