"""Training steps with the widths of the 8B model on one device, on the path of a run.

The loader with its planner, the trainer's step, DeepSpeed with the recipe's settings, fp32 master weights and moments.
Without other ranks to shard the optimizer states, one GPU holds only a part of the model: the decoder has as many
layers as fit. The frames are those of real plans, the text is random.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from keye.errors import KeyeError
from keye.model import vision
from keye.model.backends import choose
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import Sample
from scripts.bench.gpu.journal import Values, begin_peak, peak_gb, synchronize
from scripts.bench.gpu.plans import DecodedPlan, document
from scripts.bench.stages.simulated.drawn import processor
from stages.data.items import Item
from stages.data.packing.mixture import Mixture
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import build_parallel_dims
from stages.multitask import Multitask
from stages.recipe import StageRecipe
from stages.trainer import Trainer

STATES = 18  # bytes a parameter: bf16 weight and gradient, its buckets, fp32 master and two moments
SHARE = 0.6  # of the GPU's memory for these states
WORKERS = 4  # threads that make documents


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model, stage 2's context and documents, the contexts of stage 3, repetitions."""

    config: KeyeConfig
    precision: str
    context: int
    documents: int
    contexts: tuple[int, ...]
    rounds: int
    compiler: str


@dataclass(frozen=True)
class Setting:
    """How a model trains. fields: of `StageRecipe`; micro_batches: packs of a step, summed in fp32 in bf16 runs.

    attention: of the config, on a GPU. patches: of a chunk of frames, see `keye.model.vision.FRAME_PATCHES`.
    """

    zero: int = 1
    compile: bool = False
    checkpointing: bool = True
    offload: bool = False
    mlp_tiles: int = 1
    micro_batches: int = 1
    attention: str = "auto"
    patches: int = vision.FRAME_PATCHES


def sizes_of(small: bool, memory: float = 80e9, share: float = SHARE) -> Sizes:
    """The released widths with as many layers as fit in a `share` of `memory` bytes, or tiny ones in float32."""
    if small:
        config = KeyeConfig.preset("tiny", vocab_size=512)
        sizes = Sizes(config, "fp32", 256, 4, (256, 512), 1, "aot_eager")
    else:
        config = KeyeConfig.preset("keye_8b")
        around, layer = parameters_around(config)
        layers = max(1, int((share * memory / STATES - around) / layer))
        set_layers(config, min(config.text_config.num_hidden_layers, layers))
        contexts = (16_384, 32_768, 65_536, 131_072, 163_840, 196_608, 262_144)
        sizes = Sizes(config, "bf16", 8192, 8, contexts, 5, "inductor")
    processor().configure(config)
    return sizes


def set_layers(config: KeyeConfig, layers: int) -> None:
    """Give the decoder so many layers."""
    text = config.text_config
    text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]


def parameters_around(config: KeyeConfig) -> tuple[int, int]:
    """Parameters outside the decoder's layers, without norms and biases, and those of one layer."""
    text, vision = config.text_config, config.vision_config
    width = vision.hidden_size
    tower = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
    heads = 2 * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    layer = text.hidden_size * (heads + 3 * text.intermediate_size)
    return 2 * text.vocab_size * text.hidden_size + tower, layer


def check_attention(config: KeyeConfig, device: torch.device) -> None:
    """Raise a KeyeError if the decoder would use another attention than the config names."""
    text = config.text_config
    groups = text.num_attention_heads // text.num_key_value_heads
    chosen = choose(config.attention, device, torch.bfloat16, text.head_dim, groups)
    if config.attention not in ("auto", chosen):
        raise KeyeError(f"attention {config.attention!r} does not compute these heads here; {chosen!r} would")


class Documents:
    """A source of documents of one length; counts as one of `stages.data.sources.source`."""

    def __init__(self, plans: Sequence[DecodedPlan], config: KeyeConfig, length: int, visual: float) -> None:
        self.name, self.recipe, self.at = "plans", SimpleNamespace(kind="video"), 0
        self.plans, self.config, self.length, self.visual = plans, config, length, visual

    def draw_many(self, count: int) -> np.ndarray:
        self.at += count
        return np.arange(self.at - count, self.at)

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        return indices % ranks

    def items(self, index: int) -> list[Item]:
        made = document(self.plans, self.config, self.length, self.visual, int(index))
        return [Item(Sample(**made), self.name, index, "video", "")]

    def results(self, good: np.ndarray, causes: dict[int, str]) -> None:
        """All are good."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}


class Steps:
    """A stage's trainer on one device. Used as a context that closes the loader.

    Raises:
        torch.OutOfMemoryError: the model or its states do not fit.
    """

    def __init__(
        self, sizes: Sizes, setting: Setting, plans: Sequence[DecodedPlan], device: torch.device, learning_rate: float
    ) -> None:
        # A rank of its own, for a machine without a launcher.
        os.environ.setdefault("LOCAL_RANK", "0")
        engine.start()
        self.sizes, self.setting, self.plans, self.device = sizes, setting, plans, device
        self.folder = tempfile.TemporaryDirectory()
        self.recipe = StageRecipe(
            steps=1 << 20, learning_rate=learning_rate, context=sizes.context, global_batch_size=setting.micro_batches,
            zero=setting.zero, checkpointing=setting.checkpointing, mixture={"video": 1.0},
        )  # fmt: skip
        self.grid = build_parallel_dims(1)
        vision.FRAME_PATCHES = setting.patches  # a setting has a process of its own
        sizes.config.attention = setting.attention if device.type == "cuda" else "auto"
        check_attention(sizes.config, device)
        torch.manual_seed(0)
        with torch.device(device):
            self.model = KeyeForConditionalGeneration(sizes.config)
        self.parameters = sum(p.numel() for p in self.model.parameters())  # ZeRO-3 leaves a share of each
        apply_memory_options(
            self.model, setting.checkpointing, setting.offload, setting.mlp_tiles, setting.compile, sizes.compiler
        )
        stage = Multitask(self.recipe, processor())
        module = stage.prepare(self.model).train()
        self.trainer = Trainer(
            stage, module, self.loader(sizes.context, sizes.context // sizes.documents, 0.7), self.grid, self.recipe,
            Path(self.folder.name), setting.micro_batches, sizes.precision,
        )  # fmt: skip

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.loader.close()
        self.folder.cleanup()
        engine.stop()

    def loader(self, context: int, length: int, visual: float) -> Any:
        """The stage's own loader over documents of `length` tokens in packs of `context`."""
        stage = Multitask(dataclasses.replace(self.recipe, context=context), processor())
        documents = Documents(self.plans, self.sizes.config, length, visual)
        return stage.loader(Mixture([(documents, 1.0)]), self.grid, self.model, WORKERS)

    def read(self, context: int, visual: float) -> None:
        """Take one document of `context` tokens a pack from here on."""
        self.trainer.loader.close()
        self.trainer.loader = self.loader(context, context, visual)

    def step(self) -> tuple[float, dict[str, Any]]:
        """Seconds of the trainer's step, and its metrics."""
        began = time.perf_counter()
        values = self.trainer.train_step()
        synchronize(self.device)
        return time.perf_counter() - began, values

    def measure(self, rounds: int, warm_up: bool = True) -> Values:
        """The medians of `rounds` steps, after a warm-up step unless the caller has made one."""
        warm = [self.step()] if warm_up else []
        begin_peak(self.device)
        found = [self.step() for _ in range(rounds)]
        first = (warm or found)[0]
        took = median(seconds for seconds, _ in found)
        return {
            "seconds": took,
            "first": first[0],
            "stalled": median(values["stall_share"] for _, values in found),
            "tokens": found[-1][1]["tokens"],
            "rate": median(values["flops"] / seconds for seconds, values in found),
            "loss": [values["loss"] for _, values in (*warm, *found)],
            "peak": peak_gb(self.device),
            "parameters": self.parameters,
            "layers": self.sizes.config.text_config.num_hidden_layers,
        }
