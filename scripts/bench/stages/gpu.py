"""Training steps of stages 2 and 3 with the widths of the 8B model on one GPU: tokens/s, MFU, the longest context.

The path of a run: the loader with its planner, the trainer's step, DeepSpeed with the recipe's settings, fp32 master
weights and moments, layers recomputed, MLPs in tiles. Without other ranks to shard the optimizer states, one GPU can
hold only a part of the model: the decoder has as many layers as fit. Samples have random frames and text of realistic
numbers. `--small --device cpu` runs the same code on small shapes as a smoke test.
"""

import argparse
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
from torch import Tensor

from keye.errors import KeyeError, run
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.rope import stream_positions
from keye.processor.processor import Sample
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.stages.simulated.drawn import processor
from stages.cost.gpus import GPUS
from stages.data.items import Item
from stages.data.packing.mixture import Mixture
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import build_parallel_dims
from stages.multitask import Multitask
from stages.recipe import StageRecipe
from stages.trainer import Trainer

EXAMPLES = """examples:
  python -m scripts.bench stages --gpu                       on a machine with a GPU; ten minutes at most
  python -m scripts.bench.stages.gpu --small --device cpu    the same code on small shapes, anywhere
"""
SLOW, FAST, TIMESTAMP = (28, 44), (16, 24), 4  # patches of a slow and of a fast frame; tokens of a time stamp
STATES = 18  # bytes a parameter: bf16 weight and gradient, its buckets, fp32 master and two moments
COLUMNS = (
    "step", "tokens", "of them visual", "MLP tiles", "s a step", "waiting for data", "tokens/s", "TFLOP/s", "MFU",
    "GB at the peak",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model, stage 2's context and documents, the contexts of stage 3, frames, repetitions."""

    config: KeyeConfig
    precision: str
    context: int
    documents: int
    contexts: tuple[int, ...]
    frames: tuple[tuple[int, int], ...]
    rounds: int


def sizes_of(small: bool, memory: float = 80e9) -> Sizes:
    """The released widths with as many layers as fit in 60 % of `memory` bytes, or tiny ones in float32."""
    if small:
        config = KeyeConfig.preset("tiny", vocab_size=512)
        sizes = Sizes(config, "fp32", 256, 4, (256, 512), ((4, 6), (2, 4), (2, 4)), 1)
    else:
        config = KeyeConfig.preset("keye_8b")
        text, vision = config.text_config, config.vision_config
        around = 2 * text.vocab_size * text.hidden_size
        width = vision.hidden_size
        tower = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size)
        heads = 2 * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
        layer = text.hidden_size * (heads + 3 * text.intermediate_size)
        layers = int((0.6 * memory / STATES - around - tower) / layer)
        text.num_hidden_layers = max(1, min(text.num_hidden_layers, layers))
        text.layer_types = text.layer_types[: text.num_hidden_layers]
        contexts = (16_384, 32_768, 65_536, 98_304, 131_072, 163_840, 196_608)
        sizes = Sizes(config, "bf16", 8192, 8, contexts, (SLOW, FAST, FAST), 5)
    processor().configure(config)
    return sizes


def sample(sizes: Sizes, length: int, visual: float, seed: int) -> Sample:
    """A document of `length` tokens, about `visual` of them frames and their times, the rest text that is learnt."""
    draw, parts, grids, used = torch.Generator().manual_seed(seed), [], [], 0
    while True:
        height, width = sizes.frames[len(grids) % len(sizes.frames)]
        tokens = height * width // 4
        if used + tokens + TIMESTAMP > visual * length:
            break
        parts += [_text(sizes, TIMESTAMP, draw), torch.full((tokens,), sizes.config.video_token_id)]
        grids.append((1, height, width))
        used += tokens + TIMESTAMP
    ids, grid = torch.cat([*parts, _text(sizes, length - used, draw)]), torch.tensor(grids)
    patch = sizes.config.vision_config.patch_size
    return Sample(
        input_ids=ids,
        labels=torch.where(ids == sizes.config.video_token_id, -100, ids),
        position_ids=stream_positions(ids, [(sizes.config.video_token_id, grid[:, 1:] // 2)]),
        pixel_values_videos=torch.randint(
            0, 256, (int(grid.prod(1).sum()), 3, patch, patch), generator=draw, dtype=torch.uint8
        ),
        video_grid_thw=grid,
    )


class Documents:
    """A source of made-up documents of one length; counts as one of `stages.data.sources.source`."""

    def __init__(self, sizes: Sizes, length: int, visual: float) -> None:
        self.name, self.recipe, self.at = "made up", SimpleNamespace(kind="video"), 0
        self.sizes, self.length, self.visual = sizes, length, visual

    def draw_many(self, count: int) -> np.ndarray:
        self.at += count
        return np.arange(self.at - count, self.at)

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        return indices % ranks

    def items(self, index: int) -> list[Item]:
        return [Item(sample(self.sizes, self.length, self.visual, index), self.name, index, "video", "")]

    def results(self, good: np.ndarray, causes: dict[int, str]) -> None:
        """All are good."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}


def _text(sizes: Sizes, count: int, draw: torch.Generator) -> Tensor:
    """Ids of words: the special tokens come first in the vocabulary."""
    return torch.randint(64, sizes.config.text_config.vocab_size - 8, (count,), generator=draw)


class Bench:
    """A stage's trainer on one device, and what was measured of its steps."""

    def __init__(self, sizes: Sizes, device: torch.device, out: Path, limit: float) -> None:
        self.sizes, self.device, self.out, self.limit = sizes, device, out, limit
        self.began, self.rows, self.longest, self.mfu = time.monotonic(), [], 0, {}
        self.folder, self.tiles = tempfile.TemporaryDirectory(), 1
        self.settings = StageRecipe(
            steps=1 << 20, learning_rate=1e-6, context=sizes.context, global_batch_size=1, zero=1, checkpointing=True,
            mixture={"video": 1.0},
        )  # fmt: skip
        self.grid = build_parallel_dims(1)
        torch.manual_seed(0)
        with torch.device(device):
            self.model = KeyeForConditionalGeneration(sizes.config)
        apply_memory_options(self.model, checkpointing=True)
        stage = Multitask(self.settings, processor())
        module = stage.prepare(self.model).train()
        self.trainer = Trainer(
            stage, module, self.loader(sizes.context, sizes.context // sizes.documents, 0.7), self.grid, self.settings,
            Path(self.folder.name), 1, sizes.precision,
        )  # fmt: skip

    def loader(self, context: int, length: int, visual: float) -> Any:
        """The stage's own loader over documents of `length` tokens in packs of `context`."""
        stage = Multitask(dataclasses.replace(self.settings, context=context), processor())
        return stage.loader(Mixture([(Documents(self.sizes, length, visual), 1.0)]), self.grid, self.model, 4)

    def step(self) -> tuple[float, dict[str, Any]]:
        """Seconds of the trainer's step, and its metrics."""
        began = time.perf_counter()
        values = self.trainer.train_step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, values

    def measure(self, name: str, tokens: int, visual: float, rounds: int) -> bool:
        """Time steps and keep their row; False when they do not fit."""
        cuda = self.device.type == "cuda"
        try:
            self.step()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            found = [self.step() for _ in range(rounds)]
        except torch.OutOfMemoryError:
            self._row(name, tokens, visual, "does not fit")
            return False
        took, stalled = median(t for t, _ in found), median(v["stall_share"] for _, v in found)
        rate = median(v["flops"] / t for t, v in found)
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        self.mfu[name] = rate / self.ceiling if self.ceiling else 0.0
        share = f"{self.mfu[name]:.0%}" if self.ceiling else "–"
        memory = f"{peak:.0f}" if cuda else "–"
        cells = f"{took:.2f}", f"{stalled:.0%}", f"{tokens / took:,.0f}", f"{rate / 1e12:.3g}", share, memory
        self._row(name, tokens, visual, *cells)
        return True

    @property
    def ceiling(self) -> float:
        """The GPU's bf16 rate by its data sheet; 0 where it is not known."""
        if self.device.type != "cuda":
            return 0.0
        device = torch.cuda.get_device_name().lower()
        return next((gpu.peak for name, gpu in GPUS.items() if name.split("-")[0] in device), 0.0)

    def _row(self, name: str, tokens: int, visual: float, *cells: str) -> None:
        row = (name, tokens, f"{visual:.0%}", self.tiles, *cells)
        self.rows.append((*row, *["–"] * (len(COLUMNS) - len(row))))
        print(*self.rows[-1], sep=" | ", flush=True)
        self.keep("gpu_partial", [])

    def stage2(self) -> None:
        """A pack of several documents at stage 2's context."""
        self.measure("stage 2", self.sizes.context, 0.7, self.sizes.rounds)

    def stage3(self) -> None:
        """One long video a step, longer each time, until it no longer fits or the time is up."""
        # Tiles are part of the layers from here on; a layer is tiled once.
        self.tiles = 8
        apply_memory_options(self.model, checkpointing=True, mlp_tiles=self.tiles)
        for context in self.sizes.contexts:
            if time.monotonic() - self.began > self.limit:
                return
            self.trainer.loader.close()
            self.trainer.loader = self.loader(context, context, 0.9)
            if not self.measure(f"stage 3, {context:,}", context, 0.9, 1):
                return
            self.longest = context

    def keep(self, name: str, claims: Sequence[Claim]) -> None:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        weights = sum(p.numel() for p in self.model.parameters())
        notes = [
            f"{device}; {weights / 1e9:.2f} B parameters, {self.sizes.config.text_config.num_hidden_layers} decoder "
            "layers. The loader, the trainer and DeepSpeed of a run, fp32 master weights and moments. "
            "MFU is of the data sheet's dense bf16 rate; operations are "
            "the model's own, what is computed again is not counted, causal attention counts the pairs it sees."
        ]
        save(
            self.out, name, claims, [Table("Training steps on one device", COLUMNS, self.rows)], notes=notes,
            seconds=time.monotonic() - self.began, quick=self.sizes.precision == "fp32"
        )  # fmt: skip

    def conclude(self) -> None:
        """The claims, and the whole result in the place of the partial one."""
        claims = [
            Claim(f"{name}, 8B widths: MFU of a training step on one GPU", "–", f"{share:.0%}")
            for name, share in self.mfu.items()
            if self.ceiling and name in ("stage 2", f"stage 3, {self.longest:,}")
        ]
        claims.append(Claim("longest context of a training step on one GPU", "–", f"{self.longest:,} tokens"))
        self.keep("gpu", claims)
        (self.out / "gpu_partial.json").unlink(missing_ok=True)
        self.trainer.loader.close()
        self.folder.cleanup()


def main() -> int:
    parser: Any = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--gpu", action="store_true", help="this part; what python -m scripts.bench stages --gpu runs")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="small shapes: shows that it runs, proves nothing")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which no longer context is begun")
    args: argparse.Namespace = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA here, so nothing was measured and no earlier result was touched: steps at 8B widths need a GPU of "
            "40 GB. There: python -m scripts.bench stages --gpu. The same code on small shapes: --small --device cpu"
        )
        return 0
    if device.type != "cuda" and not args.small:
        raise KeyeError(f"--device {args.device} takes --small: steps at 8B shapes are measured on a GPU")
    if args.small and args.out is None:
        args.out = ROOT / ".cache" / "bench" / "quick_stages"
    # A rank of its own, for a machine without a launcher.
    os.environ.setdefault("LOCAL_RANK", "0")
    engine.start()
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 0.0
    bench = Bench(sizes_of(args.small, memory), device, out_of(args), args.limit)
    bench.stage2()
    bench.stage3()
    bench.conclude()
    engine.stop()
    return 0


if __name__ == "__main__":
    run(main)
