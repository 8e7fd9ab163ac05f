"""Training steps of stages 2 and 3 with the shapes of the 8B model on one GPU: tokens/s, MFU, the longest context.

The whole model in bfloat16 with AdamW's moments in bfloat16 (their fp32 forms are shared out over many GPUs in a real
run and take no time of the step), layers recomputed, MLPs in tiles; frames of a slow-fast video and text, random but of
the right number. Needs torch, transformers and this repository. `--small --device cpu` runs the same code on small
shapes, which proves nothing but that it runs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from keye.errors import KeyeError, run  # noqa: E402
from keye.model import flops  # noqa: E402
from keye.model.config import KeyeConfig  # noqa: E402
from keye.model.keye import KeyeForConditionalGeneration  # noqa: E402
from scripts.bench.model_timing import seconds  # noqa: E402
from scripts.bench.record import ROOT, Claim, Table, arguments, out_of, save  # noqa: E402
from stages.gpus import GPUS  # noqa: E402
from stages.memory import economise  # noqa: E402

EXAMPLES = """examples:
  python scripts/bench/stages.py --gpu                       on a machine with a GPU; ten minutes at most
  python scripts/bench/stages_gpu.py --small --device cpu    the same code on small shapes, anywhere
"""
SLOW, FAST, TIMESTAMP = (28, 44), (16, 24), 4  # patches of a slow and of a fast frame; tokens of a time stamp
COLUMNS = ("step", "tokens", "of them visual", "MLP tiles", "s a step", "tokens/s", "TFLOP/s", "MFU", "GB at the peak")


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model, stage 2's context and documents, the contexts of stage 3, frames, repetitions."""

    config: KeyeConfig
    dtype: torch.dtype
    context: int
    documents: int
    contexts: tuple[int, ...]
    frames: tuple[tuple[int, int], ...]
    rounds: int


def sizes_of(small: bool) -> Sizes:
    """The released shapes, or tiny ones in float32."""
    if small:
        config = KeyeConfig.preset("tiny", vocab_size=320)
        sizes = Sizes(config, torch.float32, 256, 4, (256, 512), ((4, 6), (2, 4), (2, 4)), 1)
    else:
        config = KeyeConfig.preset("keye_8b")
        contexts = (16_384, 32_768, 65_536, 98_304, 131_072, 163_840, 196_608)
        sizes = Sizes(config, torch.bfloat16, 8192, 8, contexts, (SLOW, FAST, FAST), 5)
    vocabulary = config.text_config.vocab_size
    config.image_token_id, config.video_token_id = vocabulary - 1, vocabulary - 2
    return sizes


def row(sizes: Sizes, lengths: Sequence[int], visual: float, device: torch.device) -> dict[str, Tensor]:
    """A packed row of documents of these lengths, about `visual` of each frames, the rest text that is learnt."""
    draw = torch.Generator().manual_seed(0)
    ids, grids = [], []
    for length in lengths:
        document, used = [], 0
        while True:
            height, width = sizes.frames[len(document) // 2 % len(sizes.frames)]
            tokens = height * width // 4
            if used + tokens + TIMESTAMP > visual * length:
                break
            document += [_text(sizes, TIMESTAMP, draw), torch.full((tokens,), sizes.config.video_token_id)]
            grids.append((1, height, width))
            used += tokens + TIMESTAMP
        ids.append(torch.cat([*document, _text(sizes, length - used, draw)]))
    row_ids, grid = torch.cat(ids)[None], torch.tensor(grids)
    labels = row_ids.roll(-1, 1)
    labels[(row_ids == sizes.config.video_token_id) | (labels == sizes.config.video_token_id)] = -100
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    labels[0, bounds[1:] - 1] = -100
    patch = sizes.config.vision_config.patch_size
    pixels = torch.randint(0, 256, (int(grid.prod(1).sum()), 3, patch, patch), generator=draw, dtype=torch.uint8)
    row = {"input_ids": row_ids, "shift_labels": labels, "cu_seqlens": bounds.int(), "video_grid_thw": grid}
    return {name: value.to(device) for name, value in (row | {"pixel_values_videos": pixels}).items()}


def _text(sizes: Sizes, count: int, draw: torch.Generator) -> Tensor:
    return torch.randint(8, sizes.config.text_config.vocab_size - 8, (count,), generator=draw)


def operations(sizes: Sizes, given: dict[str, Tensor]) -> int:
    """Of a whole training step; what is computed again is not counted."""
    frames = [(height, width) for _, height, width in given["video_grid_thw"].tolist()]
    labelled = int((given["shift_labels"] != -100).sum())
    return flops.training_step(sizes.config, frames, given["cu_seqlens"].diff().tolist(), labelled)


class Bench:
    """The model and its optimizer on one device, and what was measured of their steps."""

    def __init__(self, sizes: Sizes, device: torch.device, out: Path, limit: float) -> None:
        self.sizes, self.device, self.out, self.limit = sizes, device, out, limit
        self.began, self.rows, self.longest, self.mfu = time.monotonic(), [], 0, {}
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(sizes.dtype)
            self.model = KeyeForConditionalGeneration(sizes.config).train()
            torch.set_default_dtype(before)
        self.tiles = 1
        economise(self.model, checkpointing=True)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=fused)

    def step(self, given: dict[str, Tensor]) -> None:
        """Forward, backward, and the optimizer's step."""
        self.model(**given).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, name: str, given: dict[str, Tensor], rounds: int) -> bool:
        """Time a step and keep its row; False when it does not fit."""
        cuda = self.device.type == "cuda"
        tokens = given["input_ids"].shape[1]
        try:
            self.step(given)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            took = median(seconds(lambda: self.step(given), self.device) for _ in range(rounds))
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self._row(name, tokens, given, "does not fit")
            return False
        rate = operations(self.sizes, given) / took
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        self.mfu[name] = rate / self.ceiling if self.ceiling else 0.0
        share = f"{self.mfu[name]:.0%}" if self.ceiling else "–"
        memory = f"{peak:.0f}" if cuda else "–"
        self._row(name, tokens, given, f"{took:.2f}", f"{tokens / took:,.0f}", f"{rate / 1e12:.3g}", share, memory)
        return True

    @property
    def ceiling(self) -> float:
        """The GPU's bf16 rate by its data sheet; 0 where it is not known."""
        if self.device.type != "cuda":
            return 0.0
        told = torch.cuda.get_device_name().lower()
        return next((gpu.peak for name, gpu in GPUS.items() if name.split("-")[0] in told), 0.0)

    def _row(self, name: str, tokens: int, given: dict[str, Tensor], *cells: str) -> None:
        visual = int((given["input_ids"] == self.sizes.config.video_token_id).sum()) / tokens
        told = (name, tokens, f"{visual:.0%}", self.tiles, *cells)
        self.rows.append((*told, *["–"] * (len(COLUMNS) - len(told))))
        print(*self.rows[-1], sep=" | ", flush=True)
        self.keep("gpu_partial", [])

    def stage2(self) -> None:
        """A pack of several documents at stage 2's context."""
        each = self.sizes.context // self.sizes.documents
        self.measure("stage 2", row(self.sizes, [each] * self.sizes.documents, 0.7, self.device), self.sizes.rounds)

    def stage3(self) -> None:
        """One long video a step, longer each time, until it no longer fits or the time is up."""
        # Tiles are part of the layers from here on; a layer is tiled once.
        self.tiles = 8
        economise(self.model, checkpointing=True, mlp_tiles=self.tiles)
        for context in self.sizes.contexts:
            if time.monotonic() - self.began > self.limit:
                return
            if not self.measure(f"stage 3, {context:,}", row(self.sizes, [context], 0.9, self.device), 1):
                return
            self.longest = context

    def keep(self, name: str, claims: Sequence[Claim]) -> None:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        weights = sum(p.numel() for p in self.model.parameters())
        notes = [
            f"{device}; {weights / 1e9:.2f} B parameters. MFU is of the data sheet's dense bf16 rate; operations are "
            "the model's own, what is computed again is not counted, causal attention counts the pairs it sees."
        ]
        save(
            self.out, name, claims, [Table("Training steps on one device", COLUMNS, self.rows)], notes=notes,
            seconds=time.monotonic() - self.began, quick=self.sizes.dtype is torch.float32, script="stages_gpu",
        )  # fmt: skip

    def conclude(self) -> None:
        """The claims, and the whole result in the place of the partial one."""
        claims = [
            Claim(f"{name}, 8B shapes: MFU of a training step on one GPU", "–", f"{share:.0%}")
            for name, share in self.mfu.items()
            if self.ceiling and name in ("stage 2", f"stage 3, {self.longest:,}")
        ]
        claims.append(Claim("longest context of a training step on one GPU", "–", f"{self.longest:,} tokens"))
        self.keep("gpu", claims)
        (self.out / "gpu_partial.json").unlink(missing_ok=True)


def main() -> int:
    parser: Any = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--gpu", action="store_true", help="this part; what scripts/bench/stages.py --gpu runs")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="small shapes: shows that it runs, proves nothing")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which no longer context is begun")
    args: argparse.Namespace = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA here, so nothing was measured and no earlier result was touched: steps at 8B shapes need a GPU of "
            "140 GB. There: python scripts/bench/stages.py --gpu. The same code on small shapes: --small --device cpu"
        )
        return 0
    if device.type != "cuda" and not args.small:
        raise KeyeError(f"--device {args.device} takes --small: steps at 8B shapes are measured on a GPU")
    if args.small and args.out is None:
        args.out = ROOT / ".cache" / "bench" / "quick_stages"
    bench = Bench(sizes_of(args.small), device, out_of(args), args.limit)
    bench.stage2()
    bench.stage3()
    bench.conclude()
    return 0


if __name__ == "__main__":
    run(main)
