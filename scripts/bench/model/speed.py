"""Prefill and train step compared with transformers' Qwen2.5-VL on a real clip, and the tower's saving by slow-fast."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from keye import SlowFastEncoder
from keye.encoder import EncodedVideo
from keye.errors import run
from keye.model.vision import KeyeVisionModel
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.common.timing import in_turn, ratio
from scripts.bench.model.pairs import SIZES, Batch, batch, models, our_config
from scripts.clips import clip

CLIP = "bigbuckbunny.mp4"
LIMITS = {"min_tokens_per_frame": 16, "max_tokens_per_frame": 96}
EXAMPLES = """examples:
  python -m scripts.bench model --part speed
  OMP_NUM_THREADS=1 python -m scripts.bench.model.speed --rounds 3
"""
CPU = torch.device("cpu")


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Features, positions, all layers and the last position's logits, with a cache, as generation begins."""
    given = {name: value for name, value in inputs.items() if name != "labels"}

    def call() -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(**given, use_cache=True, logits_to_keep=1).logits

    return call


def train_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Loss on the answer and all gradients; the optimizer's part is the same for both and left out."""

    def call() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False).loss.backward()

    return call


def side_by_side(size: str, given: Batch, rounds: int) -> tuple[list[Claim], list[tuple]]:
    """Claims and rows of both models at one size."""
    pair = models(size)
    claims, rows = [], []
    for name, kind in (("prefill", prefill), ("train step", train_step)):
        times = in_turn({who: kind(model, given.inputs[who]) for who, model in pair.items()}, rounds, CPU)
        ours, theirs = times.values()
        share = ratio(ours, theirs)
        mine, other = median(ours) * 1e3, median(theirs) * 1e3
        figure = f"{mine:.0f} against {other:.0f} ms"
        claim = f"{name} compared with Qwen2.5-VL, {size} widths, {given.tokens} tokens ({given.visual} visual)"
        claims.append(Claim(claim, "no slower", figure, f"{share:.2f} × its time", share <= 1.0))
        rows.append((size, name, f"{mine:.1f}", f"{other:.1f}", f"{share:.3f}"))
        print(f"{size}, {name}: {figure}, {share:.2f}", flush=True)
    return claims, rows


def pathways(videos: dict[str, EncodedVideo], rounds: int) -> tuple[list[Claim], list[tuple]]:
    """The tower over the slow-fast clip and over the same frames all slow."""
    torch.manual_seed(0)
    tower = KeyeVisionModel(our_config("middle").vision_config)
    patches = {name: len(video.pixel_values) for name, video in videos.items()}
    share = patches["slow-fast"] / patches["all slow"]
    claims, rows = [], []
    for name, training in (("forward", False), ("forward + backward", True)):

        def step(video: EncodedVideo, training: bool = training) -> None:
            tower.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(training):
                features = tower(video.pixel_values, video.grid_thw)
            if training:
                features.sum().backward()

        times = in_turn({name: (lambda v=video: step(v)) for name, video in videos.items()}, rounds, CPU)
        taken = ratio(times["slow-fast"], times["all slow"])
        claim = f"tower over a slow-fast clip, {name}, share of the time of the same frames all slow"
        # Two hundredths for what a timer cannot tell apart.
        claims.append(Claim(claim, f"≤ {share:.2f}, its share of patches", f"{taken:.2f}", met=taken <= share + 0.02))
        cells = [f"{median(times[path]) * 1e3:.1f}" for path in ("slow-fast", "all slow")]
        rows.append((name, *patches.values(), f"{share:.3f}", *cells, f"{taken:.3f}"))
        print(f"tower, {name}: {taken:.3f} of the time for {share:.3f} of the patches", flush=True)
    return claims, rows


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="model")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (9; 2 with --quick)")
    args = parser.parse_args()
    began = time.monotonic()
    rounds = args.rounds or (2 if args.quick else 9)
    path = str(clip(CLIP))
    videos = {
        "slow-fast": SlowFastEncoder(**LIMITS)(path),
        "all slow": SlowFastEncoder(policy="all_slow", **LIMITS)(path),
    }
    claims, rows = [], []
    for size in ("tiny",) if args.quick else SIZES:
        given = batch(videos["slow-fast"].pixel_values, videos["slow-fast"].grid_thw, SIZES[size][1][-1])
        found, cells = side_by_side(size, given, rounds)
        claims += found
        rows += cells
    found, shares = pathways(videos, rounds)
    columns = ("widths", "what", "ours", "Qwen2.5-VL", "ratio, median over rounds")
    tower = ("what", "patches", "patches all slow", "share of patches", "ms", "ms all slow", "share of time")
    tables = [
        Table(
            f"Median milliseconds of processor time, threads: {torch.get_num_threads()}, float32, sdpa in both",
            columns,
            rows,
        ),
        Table("The tower at the middle widths, milliseconds of processor time", tower, shares),
    ]
    shapes = "; ".join(f"{name}: vision {vision}, text {text}" for name, (vision, text) in SIZES.items())
    notes = [
        f"{CLIP} by SlowFastEncoder at 16 to 96 tokens a frame. Widths (vision width, MLP, layers, heads; text width, "
        f"MLP, layers, heads, key heads, vocabulary): {shapes}. Qwen2.5-VL gets the same frames, patches and tokens: "
        "no merging of frames in time, whole frames in every vision layer, vision MLPs two thirds as wide because they "
        "are gated. Rounds alternate after a warm-up; a ratio is the median over rounds.",
        "The train step is the loss on a 32-token answer and all gradients. Ours computes logits where there are "
        "labels alone, transformers' everywhere: part of the difference, the more so the larger the vocabulary.",
    ]
    save(
        out_of(args), "speed", claims + found, tables, seconds=time.monotonic() - began, quick=args.quick,
        seeds={"weights and text": 0}, notes=notes
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
