"""Memory and time of one training step on a long video, from 8,192 to 131,072 tokens, on one process and on two.

For each context a SlowFastWorld clip that fills the context is generated, encoded by the processor with the context as
its limit, and packed; text of the world fills the rest of the pack, so that no token is padding. The tiny model then
takes an annealing step on the pack in the same way as `scripts/pretrain.py` (DeepSpeed, recomputed layers, tiled MLPs),
in one process, or in two that share the pack (Ulysses, each with the pixels of its frames). The result is the peak
resident memory of a process above its memory before the step.

Rows are saved in .cache/bench/stages_context; after an interruption, the same command resumes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.errors import KeyeError, run
from keye.slowfast.pixels import as_bytes
from scripts.bench.common.process import resident
from scripts.bench.common.record import ROOT, Claim, Table, arguments, forget_other_code, out_of, save

if TYPE_CHECKING:  # the bench's main process loads neither torch nor transformers
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from stages.annealing import Annealing
    from stages.distributed.parallel import ParallelDims

EXAMPLES = """examples:
  python -m scripts.bench.stages.context                  8,192 … 131,072 tokens; resumes after an interruption
  python -m scripts.bench.stages.context --fresh          forgets what an earlier run measured
  python -m scripts.bench.stages.context --contexts 8192 65536
"""
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
QUICK = (8192, 16384)
PROCESSES = (2, 1)  # the longest on two comes before the longest on one, which takes as long again
SCRATCH = ROOT / ".cache" / "bench" / "stages_context"
SEED = 5
SIZE = 448  # pixels a side: a slow frame is 256 tokens
TOKENS_PER_SECOND = 140  # of such a clip, a little below what it takes
TILE = 1024  # tokens that pass through an MLP at once
ENCODER = {
    "measure": "patch_l1",
    "threshold": 0.8,
    "fps": 2.0,
    "min_tokens_per_frame": 16,
    "max_tokens_per_frame": 256,
}
# glibc keeps freed blocks of up to 32 MB for itself; returned at once, resident memory is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
LIMIT = 7200  # seconds that a row may take


@dataclass(frozen=True)
class Row:
    """One step: bytes are of each process, by rank."""

    context: int
    processes: int
    video_tokens: int
    frames: int
    seconds: float
    peaks: list[int]
    loss: float
    gradient: float


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS", help="instead of 8,192 … 131,072")
    parser.add_argument("--fresh", action="store_true", help="forget rows that were measured before")
    parser.add_argument("--draw", type=int, help=argparse.SUPPRESS)  # one of the bench's own processes
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw is not None:
        return draw(args.draw)
    if args.step is not None:
        return step(args.step)
    if args.fresh:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    forget_other_code(SCRATCH)
    began = time.monotonic()
    rows = [measure(c, n) for c in args.contexts or (QUICK if args.quick else CONTEXTS) for n in PROCESSES]
    report(rows, out_of(args), time.monotonic() - began, args.quick)
    return 0


def measure(context: int, processes: int) -> Row:
    """The row, from a former run or measured now, with the drawing before it if need be."""
    path = row_path(context, processes)
    if not path.exists():
        if not (SCRATCH / f"{context}.safetensors").exists():
            launch([sys.executable, "-m", __spec__.name, "--draw", str(context)])
        spread = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend", "c10d"]
        spread += ["--rdzv-endpoint", "localhost:0", "-m", "--", __spec__.name]
        launch([sys.executable, *spread, "--step", str(context)])
    row = Row(**json.loads(path.read_text()))
    print(
        f"{context:>7} tokens on {processes}: {max(row.peaks) / 2**20:,.0f} MiB a process, {row.seconds:.1f} s, "
        f"loss {row.loss:.5f}",
        flush=True,
    )
    return row


def row_path(context: int, processes: int) -> Path:
    return SCRATCH / f"{context}-{processes}.json"


def launch(command: list[str]) -> None:
    """Run one of the bench's own processes; KeyeError with the end of what it said when it fails."""
    cores = len(os.sched_getaffinity(0))
    processes = int(command[command.index("--nproc_per_node") + 1]) if "--nproc_per_node" in command else 1
    env = os.environ | MALLOC | {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise KeyeError(f"{' '.join(command[-2:])} failed:\n" + "\n".join(done.stderr.splitlines()[-25:]))


def tokenizer() -> "PreTrainedTokenizerFast":
    """A small one of the world's own text, made once."""
    from keye.processor.tokenizer import load_tokenizer, train_tokenizer
    from keye.world import texts

    folder = SCRATCH / "tokenizer"
    if not folder.exists():
        train_tokenizer(texts(SEED), 1024).save_pretrained(folder)
    return load_tokenizer(str(folder))


def draw(context: int) -> int:
    """Draw, encode and pack a clip for `context` tokens → `<context>.safetensors`, pixels as bytes."""
    import torch
    from safetensors.torch import save_file

    from keye.processor.processor import KeyeProcessor
    from keye.world import generate
    from stages.data.collate import pack

    folder = SCRATCH / str(context)
    processor = KeyeProcessor(tokenizer(), encoder=ENCODER | {"max_tokens": context})
    # A `find` clip is twice as long as its setting says; the world counts in halves of a second.
    seconds = round(context / TOKENS_PER_SECOND) / 2
    counts = {"find": 1, "text": 100 + context // 100}
    generate(folder, "train", counts, SEED, (SIZE, SIZE), seconds, workers=1, progress=False)
    chats = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    video, *texts = (processor.sample(chat["messages"], folder, max_length=context) for chat in chats)
    row = pack([video, *texts])
    if row["input_ids"].shape[1] < context or len(video) < 0.9 * context:
        held = f"the clip has {len(video)} tokens of {context}, with texts there are {row['input_ids'].shape[1]}"
        raise KeyeError(f"{held}; lower TOKENS_PER_SECOND, or draw more texts")
    bounds = row["cu_seqlens"].tolist()
    row |= {name: row[name][..., :context].clone() for name in ("input_ids", "position_ids", "shift_labels")}
    row["cu_seqlens"] = torch.tensor([*(b for b in bounds if b < context), context], dtype=torch.int32)
    row["pixel_values_videos"] = as_bytes(row["pixel_values_videos"])
    row["video_tokens"] = torch.tensor(len(video))
    save_file(row, SCRATCH / f"{context}.partial")
    (SCRATCH / f"{context}.partial").rename(SCRATCH / f"{context}.safetensors")
    shutil.rmtree(folder)
    return 0


def step(context: int) -> int:
    """Take the step in this process and its neighbours; rank 0 writes the row."""
    import torch
    import torch.distributed as dist

    from keye.model.config import KeyeConfig
    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor
    from stages.annealing import Annealing
    from stages.distributed import engine
    from stages.distributed.activation_memory import apply_memory_options
    from stages.distributed.parallel import build_parallel_dims
    from stages.recipe import AnnealingRecipe

    engine.start()
    world = dist.get_world_size()
    grid, tiles = build_parallel_dims(world), max(1, context // world // TILE)
    settings = AnnealingRecipe(
        steps=2, learning_rate=1e-4, schedule="constant", context=context, global_batch_size=1, zero=1,
        sequence_parallel=world, checkpointing=True, mlp_tiles=tiles,
    )  # fmt: skip
    processor = KeyeProcessor(tokenizer(), encoder=ENCODER)
    torch.manual_seed(SEED)
    config = KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer))
    model = KeyeForConditionalGeneration(processor.configure(config))
    apply_memory_options(model, settings.checkpointing, settings.offload, settings.mlp_tiles)
    stage = Annealing(settings, processor)
    built = engine.build(stage.prepare(model).train(), settings, settings.steps, zero=settings.zero)
    learn(stage, built, words(), grid)  # what is loaded or made once is there from here on
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    batch = load(SCRATCH / f"{context}.safetensors", grid)
    video, frames = int(batch.pop("video_tokens")), len(batch["video_grid_thw"])
    dist.barrier()
    began = time.perf_counter()
    loss, gradient = learn(stage, built, batch, grid)
    seconds = time.perf_counter() - began
    peaks: list[int] = [0] * world
    dist.all_gather_object(peaks, resident("VmHWM") - before)
    if dist.get_rank() == 0:
        row = Row(context, world, video, frames, seconds, peaks, loss, gradient)
        partial = row_path(context, world).with_suffix(".partial")
        partial.write_text(json.dumps(asdict(row)))
        partial.rename(row_path(context, world))
    engine.stop()
    return 0


def learn(stage: "Annealing", built: Any, batch: dict[str, "Tensor"], grid: "ParallelDims") -> tuple[float, float]:
    """A step on one pack as the trainer takes it; the mean loss and the norm of the gradient."""
    import torch

    from stages.distributed.parallel import sum_over_ranks

    labels = float(sum_over_ranks(torch.tensor(stage.weight(batch, grid))))
    loss = stage.loss(built, batch, grid)
    built.backward(loss * (grid.world / labels))
    built.step()
    return float(sum_over_ranks(loss)) / labels, float(built.get_global_grad_norm())


def words() -> dict[str, "Tensor"]:
    """A pack of 64 tokens without pictures."""
    import torch

    ids = torch.arange(10, 74)[None]
    positions = torch.arange(64).expand(3, 1, 64)
    bounds = torch.tensor([0, 64], dtype=torch.int32)
    return {"input_ids": ids, "position_ids": positions, "shift_labels": ids.clone(), "cu_seqlens": bounds}


def load(path: Path, grid: "ParallelDims") -> dict[str, "Tensor"]:
    """The pack with the pixels of this rank's frames alone, as the loader hands it out."""
    import torch
    from safetensors import safe_open

    from stages.distributed.parallel import piece_pixels, vision_shares

    with safe_open(path, "pt") as file:
        row = {name: file.get_tensor(name).clone() for name in file.keys() if name != "pixel_values_videos"}  # noqa: SIM118
        patches = row["video_grid_thw"].prod(1)
        firsts = (patches.cumsum(0) - patches).tolist()
        share = vision_shares(row["video_grid_thw"], grid.sequence)[grid.sequence_rank]
        pixels, at = torch.empty(sum(4 * piece.tokens for piece in share), 3, 14, 14, dtype=torch.uint8), 0
        stored = file.get_slice("pixel_values_videos")
        for piece in share:
            first, frame = firsts[piece.frame], piece.frame
            own = piece_pixels(stored[first : first + int(patches[frame])], row["video_grid_thw"][frame], piece)
            pixels[at : at + len(own)] = own
            at += len(own)
    return row | {"pixel_values_videos" if grid.sequence == 1 else "pixel_values_mine": pixels}


def report(rows: list[Row], out: Path, seconds: float, quick: bool) -> None:
    """Claims and the table."""
    peak = {(row.context, row.processes): max(row.peaks) for row in rows}
    contexts = sorted({row.context for row in rows})
    longest = next(row for row in rows if (row.context, row.processes) == (contexts[-1], 2))
    by = {(row.context, row.processes): row for row in rows}
    ratios = [(by[c, 2].loss / by[c, 1].loss, by[c, 2].gradient / by[c, 1].gradient) for c in contexts]
    apart = max(abs(ratio - 1) for pair in ratios for ratio in pair)
    steepest = max((peak[b, n] / peak[a, n] / (b / a) for a, b in pairwise(contexts) for n in PROCESSES), default=0.0)
    shares = {c: peak[c, 2] / peak[c, 1] for c in contexts}
    claims = [
        Claim(
            f"a step on {longest.context:,} real tokens, {longest.video_tokens:,} of them of one video",
            "on a CPU with 2 processes",
            f"{max(longest.peaks) / 2**20:,.0f} MiB a process, {longest.seconds:,.0f} s",
            met=longest.context >= CONTEXTS[-1] or None,
        ),
        Claim(
            f"memory grows no faster than the context, {contexts[0]:,} … {contexts[-1]:,}",
            "linear",
            f"at most {steepest:.2f} × the context's growth from one to the next",
            met=steepest <= 1.1 if steepest else None,
        ),
        Claim(
            f"the second process halves the memory of each, at {contexts[-1]:,}",
            "0.5 × to within 20 %",
            f"{shares[contexts[-1]]:.2f} ×",
            met=0.4 <= shares[contexts[-1]] <= 0.6,
        ),
        Claim(
            "two processes have the loss and the gradient of one",
            "to 1e-5",
            f"{apart:.1e} apart at most",
            met=apart <= 1e-5,
        ),
    ]
    columns = (
        "tokens", "of the video", "frames", "processes", "MiB a process", "KiB a token", "seconds", "tokens/s", "loss"
    )  # fmt: skip
    cells = [
        (
            f"{row.context:,}", f"{row.video_tokens:,}", f"{row.frames:,}", row.processes,
            f"{max(row.peaks) / 2**20:,.0f}", f"{max(row.peaks) * row.processes / row.context / 1024:.1f}",
            f"{row.seconds:,.1f}", f"{row.context / row.seconds:,.0f}", f"{row.loss:.6f}",
        )
        for row in rows
    ]  # fmt: skip
    notes = [
        "Memory is the highest resident memory of the largest process during the step, its pack's loading included, "
        "above what it held when it was ready to take it; KiB a token is over all processes. Seconds are of the one "
        "step, forward, backward and AdamW. The tiny model, fp32, ZeRO-1, layers recomputed except their attention."
    ]
    table = Table("One step on a pack", columns, cells)
    seeds = {"world and model": SEED}
    save(out, "context", claims, [table], seconds=seconds, quick=quick, seeds=seeds, notes=notes)


if __name__ == "__main__":
    run(main)
